"""The tables that a run left as Markdown: read back, and folded for a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.shared.command import ExperimentError

NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?(?=[ (]|$)")
HEADING = re.compile(r'(?:#{2,4} |\?\?\? abstract ")(.*?)"?')


NOTES = '??? note "How to read these tables"'


class Cell(NamedTuple):
    """Mean and half-width of its 95 % interval, None where there is none; the form that both are written in."""

    mean: float
    half: float | None
    form: str

    def __str__(self) -> str:
        return f"{self.mean:{self.form}}" + ("" if self.half is None else f" ± {self.half:{self.form.lstrip('+')}}")

    def p(self, seeds: int) -> float | None:
        """Of the two-sided t test that gave the interval; None without one."""
        from scipy.stats import t

        if self.half is None:
            return None
        if self.half == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * t.sf(abs(self.mean) / self.half * t.ppf(0.975, seeds - 1), seeds - 1))


class Table(NamedTuple):
    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, dict[str, str]]]  # label, and by column the text

    def row(self, label: str, after: str | None = None) -> dict[str, Cell]:
        """The numbers of a row by column, without cells that have none, as "not reached"; `after` is the row above it, where
        several have one label."""
        above = [None, *(name for name, _ in self.rows)]
        cells = next(
            of for (name, of), before in zip(self.rows, above, strict=False) if name == label and after in (None, before)
        )
        return {column: found for column, text in cells.items() if (found := cell(text)) is not None}

    def column(self, name: str) -> dict[str, Cell]:
        """The numbers of a column by row."""
        return {label: found for label, of in self.rows if (found := cell(of[name])) is not None}


class Tables(NamedTuple):
    tables: list[Table]
    notes: list[str]  # what stands between and below them

    def named(self, start: str) -> Table:
        return next(table for table in self.tables if table.title.startswith(start))

    def seeds(self) -> int:
        """How many, as the note below the tables says."""
        notes = " ".join(self.notes)
        if "One seed" in notes:
            return 1
        found = re.search(r"over (\d+) seeds", notes)
        if found is None:
            raise ExperimentError("the note below the tables must say 'over N seeds'; copy the whole tables.md of a run")
        return int(found[1])


def cell(text: str) -> Cell | None:
    found = NUMBER.match(text.replace("**", "").strip())
    if found is None:
        return None
    digits = len(found[1].partition(".")[2])
    sign = "+" if found[1][0] in "+-" else ""
    return Cell(float(found[1]), None if found[2] is None else float(found[2]), f"{sign}.{digits}f")


def read(path: Path) -> Tables:
    """Tables under headings or in folds; one without either has the title ""."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ExperimentError(f"a study's tables must be in the documentation, got {path}: {error}") from None
    found = Tables([], [])
    title, head = "", None
    for line in lines:
        if not line.startswith("|"):
            head = None
            heading = HEADING.fullmatch(line)
            if heading is not None:
                title = heading[1]
            elif line and line != NOTES:
                found.notes.append(line)
            continue
        cells = [part.strip() for part in line.strip("|").split("|")]
        if head is None:
            head = cells
            found.tables.append(Table(title, head[0], head[1:], []))
            title = ""
        elif set("".join(cells)) - set("-: "):
            found.tables[-1].rows.append((cells[0], dict(zip(head[1:], cells[1:], strict=True))))
    if not found.tables:
        raise ExperimentError(f"{path} must hold tables, got none")
    return found


def folded(tables: Tables, untitled: Sequence[str]) -> str:
    """Each table in a fold; `untitled` are the titles of those without one, in their order. The notes come last,
    in a fold of their own."""
    titles, parts = iter(untitled), []
    for table in tables.tables:
        lines = [[table.corner, *table.columns], ["---", *["---:"] * len(table.columns)]]
        lines += [[label, *row.values()] for label, row in table.rows]
        body = "\n".join("    | " + " | ".join(line) + " |" for line in lines)
        parts.append(f'??? abstract "{table.title or next(titles)}"\n\n{body}\n')
    notes = "\n\n".join(f"    {note}" for note in tables.notes)
    return "\n".join([*parts, f"{NOTES}\n\n{notes}\n"])
