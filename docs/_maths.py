"""Maths without JavaScript and without fonts: what pymdownx.arithmatex marks as LaTeX becomes MathML when the site is built."""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexToMathML

LATEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
TAG = re.compile(r"\\tag\{(\w+)\}")
CONVERTER = LatexToMathML()


def on_page_content(content: str, **_: Any) -> str:
    return LATEX.sub(lambda match: to_mathml(html.unescape(match[2]), block=match[1] == "div"), content)


def to_mathml(latex: str, block: bool) -> str:
    """A formula that cannot be read raises, so the build fails; \\tag numbers it."""
    tag = TAG.search(latex)
    mathml = CONVERTER.convert_with_local_state(TAG.sub("", latex), displaystyle=block)
    if not block:
        return mathml
    number = f'<span class="number" id="equation-{tag[1]}">({tag[1]})</span>' if tag else ""
    return f'<div class="equation">{mathml}{number}</div>'
