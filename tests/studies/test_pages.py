"""Pages of studies that left tables: what is read back, the verdicts made of it, and that the committed ones are those."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from examples.shared.command import ExperimentError
from studies import verdicts
from studies.pages import panels, tables
from studies.pages.__main__ import PAGES, main
from studies.pages.lines import line
from studies.verdicts import Test as One

DOCS = Path(__file__).parents[2] / "docs"
TEXT = """### First, with a title

| | a | b |
|---|---:|---:|
| x | 1.50 ± 0.25 | –  |
| same | +0.10 ± 0.20 (3) | not reached |
| same | -3 | **2.0** |

| arm | c |
| --- | --- |
| y | 0.1: 2, 1: 3 |

Mean over 5 seeds (Student's t).
"""


@pytest.fixture
def read(tmp_path):
    def of(text: str) -> tables.Tables:
        (tmp_path / "tables.md").write_text(text, encoding="utf-8")
        return tables.read(tmp_path / "tables.md")

    return of


def test_tables_are_read_back(read):
    found = read(TEXT)
    first, second = found.tables
    assert (first.title, first.columns, second.title, second.corner) == ("First, with a title", ["a", "b"], "", "arm")
    assert first.row("x") == {"a": tables.Cell(1.5, 0.25, ".2f")}
    assert {column: str(one) for column, one in first.row("same", "x").items()} == {"a": "+0.10 ± 0.20"}
    assert {column: str(one) for column, one in first.row("same", "same").items()} == {"a": "-3", "b": "2.0"}
    assert list(first.column("a")) == ["x", "same"]
    assert second.row("y") == {}
    assert found.seeds() == 5
    with pytest.raises(StopIteration):
        first.row("x", "same")


def test_folding_keeps_every_cell_and_folds_once(read):
    found = read(TEXT)
    text = tables.folded(found, ["Second"])
    assert text.count('??? abstract "') == 2
    assert '??? abstract "Second"\n\n    | arm | c |' in text
    assert "    | same | +0.10 ± 0.20 (3) | not reached |" in text
    again = read(text)
    assert [table.rows for table in again.tables] == [table.rows for table in found.tables]
    assert again.notes == found.notes
    assert tables.folded(again, []) == text


def test_p_of_a_printed_interval_by_hand():
    # 95 % half-width of 5 seeds is 2.776445 standard errors; t = 2.776445 is p = .05
    assert tables.Cell(1.0, 1.0, ".1f").p(5) == pytest.approx(0.05)
    assert tables.Cell(-2.0, 1.0, ".1f").p(5) == pytest.approx(0.00512, abs=1e-4)
    assert tables.Cell(1.0, None, ".1f").p(5) is None
    assert [tables.Cell(mean, 0.0, ".1f").p(5) for mean in (0.0, 1.0)] == [1.0, 0.0]


def test_messages(read, tmp_path):
    with pytest.raises(ExperimentError, match="must hold tables, got none"):
        read("nothing\n")
    with pytest.raises(ExperimentError, match="must be in the documentation, got "):
        tables.read(tmp_path / "missing.md")
    with pytest.raises(ExperimentError, match="must say 'over N seeds'"):
        read("| a | b |\n|---|---|\n| c | 1 |\n").seeds()


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ([One(0.01, 1)], "shown"),
        ([One(0.01, -1)], "refuted"),
        ([One(0.06, 1)], "not shown"),
        ([One(0.03, 1), One(0.9, 1)], "not shown"),  # .06 after Holm's adjustment
        ([One(0.02, 1), One(0.9, 1)], "shown in 1 of 2 arms"),
        ([One(0.001, 1), One(0.001, -1)], "shown in 1 of 2 arms, refuted in 1 of 2 arms"),
        ([], "not shown"),
    ],
)
def test_the_rule_of_all_verdicts(tests, expected):
    assert verdicts.word(tests, "arms") == expected


@pytest.mark.parametrize(("sign", "expected"), [(1, "**Refuted: it rises**"), (-1, "**Shown: it rises**")])
def test_a_claim_may_ask_for_less(sign, expected):
    assert line("it rises", [tables.Cell(-2.0, 0.5, "+.1f")], sign, 5) == expected


def test_no_line_ends_inside_a_number():
    assert verdicts.unbroken("+1.0 ± 0.5, p .029, 9 %") == "+1.0\u00a0±\u00a00.5, p\u00a0.029, 9\u00a0%"


def test_a_panel_writes_what_is_beyond_its_scale():
    cells = {"q": {"far": tables.Cell(2.0, 1.0, ".1f"), "near": tables.Cell(90.0, 1.0, ".1f")}}
    figure = panels.panels(cells, ["far", "near", "none"], limits={"q": (80.0, 100.0)}, names={"near": "near (here)"},
                           heads={"near": "a group"})  # fmt: skip
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["not measured", "◀ 2.0 ± 1.0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["none", "near (here)", "a group", "far"]
    assert [text.get_fontweight() for text in axes.get_yticklabels()] == ["normal", "normal", "bold", "normal"]
    assert axes.get_xlim() == (80.0, 100.0)
    plt.close(figure)


def test_the_committed_pages_are_those_of_the_committed_tables(tmp_path):
    for name in PAGES:
        (tmp_path / f"{name}_tables.md").write_bytes((DOCS / f"{name}_tables.md").read_bytes())
    (tmp_path / "images").mkdir()
    assert main(["--docs", str(tmp_path)]) == 0
    for name in PAGES:
        for kind in ("tables", "verdict"):
            assert (tmp_path / f"{name}_{kind}.md").read_text(encoding="utf-8") == (DOCS / f"{name}_{kind}.md").read_text(
                encoding="utf-8"
            )
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 10_000
        assert (DOCS / "images" / f"{name}.png").exists()
        taken = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
        assert all(f"docs/{name}_{kind}.md" in taken for kind in ("tables", "verdict"))
        assert f"images/{name}.png" in taken
