"""What this project's docstrings have beyond Google's style, as Markdown, for griffe: Shape, Source, doctests anywhere."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?:\*\*(Shape)\*\*|(Source):)\n((?: {4}.*\n?|\n(?= {4}))+)", flags=re.MULTILINE)
DOCTEST = re.compile(r"((?:^(?:>>>|\.\.\.).*\n?(?:(?!>>>|\n).+\n?)*)+)", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    text = SECTION.sub(lambda match: f"**{match[1] or match[2]}**\n\n" + re.sub(r"^ {4}", "", match[3], flags=re.M), text)
    # one entry for two names: griffe takes what follows a space for the type
    text = re.sub(r"^( {4}\w+), (\w+):", "\\1,\N{NO-BREAK SPACE}\\2:", text, flags=re.M)
    return DOCTEST.sub(r"```pycon\n\1\n```\n", text)
