"""The notebooks: each runs from top to bottom in a new kernel, and what it prints is what is saved in it."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest

from examples.notebooks.__main__ import PATHS, executed

# a number is another one under another torch or another number of threads
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|\bnan\b")

pytestmark = pytest.mark.slow


def shown(notebook: nbformat.NotebookNode) -> list[list[object]]:
    """Of each code cell what is under it: text, without its numbers, and the kind of everything else."""

    def told(output: nbformat.NotebookNode) -> object:
        data = output.get("data", {"text/plain": output.get("text")})
        return "picture" if "image/png" in data else NUMBER.sub("#", data["text/plain"]).split()

    return [[told(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_what_is_saved_in_it(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert shown(executed(path, tmp_path)) == shown(notebook), "save what it prints now: python -m examples.notebooks"
    assert "picture" in str(shown(notebook))


def test_there_are_two() -> None:
    assert [path.stem for path in PATHS] == ["paper_in_ten_minutes", "wrap_and_watch"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_small_and_its_pictures_are_described(path: Path) -> None:
    assert path.stat().st_size < 200_000
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata["alt"]) > 20


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_page_of_a_notebook_holds_all_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("markdown")
    root = Path(__file__).parents[2]
    page = runpy.run_path(str(root / "docs" / "_notebooks.py"))["to_markdown"]
    name = path.relative_to(root).as_posix()
    monkeypatch.delenv("REPO_URL", raising=False)
    text = page(name)
    cells = nbformat.read(path, as_version=4).cells
    assert text.startswith("# ")
    assert text.count("```") % 2 == 0
    assert text.count("<img ") == sum("picture" in of_cell for of_cell in shown(nbformat.read(path, as_version=4)))
    lines = [line for cell in cells for line in cell.source.splitlines() if line]
    assert [line for line in lines if line not in text] == []
    assert "colab" not in text
    monkeypatch.setenv("REPO_URL", "https://github.com/owner/name")
    assert f"(https://colab.research.google.com/github/owner/name/blob/main/{name})" in page(name)
