"""Notebooks as pages: a line `--8<-- "examples/notebooks/NAME.ipynb"` becomes its cells and saved outputs, as Markdown.

A notebook is JSON, and these hold text and pictures only, so no converter is asked for. Built like `_maths`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

ROOT = Path(__file__).parents[1]
LINE = re.compile(r'^--8<-- "(.+\.ipynb)"$', flags=re.MULTILINE)


class Cells(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return LINE.sub(lambda match: to_markdown(match[1]), "\n".join(lines)).split("\n")


class Notebooks(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Python-Markdown's name
        md.preprocessors.register(Cells(md), "notebooks", 40)  # before snippets (32), whose line it is otherwise


def makeExtension(**options: Any) -> Notebooks:  # noqa: N802
    return Notebooks(**options)


def on_config(config: Any) -> None:
    config.markdown_extensions.append(Notebooks())


def to_markdown(path: str) -> str:
    """The page; under the title, where the file is and, if the site knows its repository, a link that opens it."""
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    title, *lines = "".join(cells[0]["source"]).splitlines()
    where = f"The file: `{path}`."
    if repository := os.environ.get("REPO_URL", "").removeprefix("https://github.com/"):
        where += f" [Open it in Colab](https://colab.research.google.com/github/{repository}/blob/main/{path})."
    return "\n".join([title, "", where, "", *lines, *(line for cell in cells[1:] for line in of_cell(cell))])


def of_cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"]).splitlines()
    yield ""
    if cell["cell_type"] == "markdown":
        yield from source
        return
    code = ["```python", *source, "```"]
    # a long cell that says by its metadata what it is lies folded
    title = cell["metadata"].get("fold")
    yield from [f'??? example "{title}"', "", *(f"    {line}" for line in code)] if title else code
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        yield ""
        if "image/png" in data:
            picture = "".join(data["image/png"]).replace("\n", "")
            yield f'<img alt="{cell["metadata"]["alt"]}" src="data:image/png;base64,{picture}">'
        else:
            yield from ["```{ .text .output }", *"".join(data["text/plain"]).splitlines(), "```"]
