"""Maths without JavaScript and without fonts: what pymdownx.arithmatex marks as LaTeX becomes MathML when the site is built.

An extension of Python-Markdown, so any builder on it can list it; MkDocs, which looks for none in here, gets it by a hook.
"""

from __future__ import annotations

import html
import re
from typing import Any

from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor
from math_core import LatexToMathML

LATEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
TAG = re.compile(r"\\tag\{(\w+)\}")
CONVERTER = LatexToMathML()


class Formulas(Postprocessor):
    def run(self, text: str) -> str:
        return LATEX.sub(lambda match: to_mathml(html.unescape(match[2]), block=match[1] == "div"), text)


class Maths(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Python-Markdown's name
        md.postprocessors.register(Formulas(md), "maths", 0)  # after all others, so on the HTML as it will be


def makeExtension(**options: Any) -> Maths:  # noqa: N802
    return Maths(**options)


def on_config(config: Any) -> None:
    config.markdown_extensions.append(Maths())


def to_mathml(latex: str, block: bool) -> str:
    """A formula that cannot be read raises, so the build fails; \\tag numbers it. A wide one scrolls, by keys too."""
    tag = TAG.search(latex)
    mathml = CONVERTER.convert_with_local_state(TAG.sub("", latex), displaystyle=block)
    if not block:
        return mathml
    number = f'<span class="number" id="equation-{tag[1]}">({tag[1]})</span>' if tag else ""
    return f'<div class="equation"><div class="formula" tabindex="0">{mathml}</div>{number}</div>'
