"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .comparison import Comparison
from .inspection import CheckpointReport
from .words import (
    COMPARED,
    INSPECTED,
    OVER_TIME,
    WITH_DATA,
    candidates,
    compared_rows,
    data_rows,
    fresh_rows,
    heading,
    inspected_row,
    labels,
    over_time_rows,
)

# by importance: what is left out first where the terminal is narrow stands last
_WANTED = (
    "gate",
    "checkpoint",
    "verdict",
    "verdict now",
    "not healthy",
    "stable rank",
    "change",
    "certified",
    "centred",
    "σ max",
)
_VERDICT = 24  # columns of the terminal; it wraps
_STYLES = {"healthy": "green", "narrow": "yellow", "loud": "yellow", "dead-looking": "yellow", "duplicates": "yellow"}


def console(stderr: bool = False) -> Any:
    """A console of rich.

    Raises:
        ModuleNotFoundError: rich is missing.
    """
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'the table needs rich; pip install "spectral-router[report]", or write --json - for the numbers alone'
        ) from None
    return Console(stderr=stderr, highlight=False)


def show_inspection(out: Any, report: CheckpointReport) -> None:
    """One gate a row, what a fresh one would have first, then what was found out on the way."""
    names = labels([gate.name for gate in report.gates])
    rows = [inspected_row(gate, label) for gate, label in zip(report.gates, names, strict=True)]
    _table(out, heading(report), INSPECTED, fresh_rows(report), rows)
    for gate, label in zip(report.gates, names, strict=True):
        for verdict in gate.verdicts:
            if verdict.word != "healthy":
                out.print(f"  {label}: {verdict} ({verdict.rule})", markup=False)
        for note in gate.notes:
            out.print(f"  {label}: {note}", markup=False)
    for note in report.notes:
        out.print(f"  {note}", markup=False)
    _candidates(out, candidates(report.gates))


def show_comparison(out: Any, comparison: Comparison) -> None:
    """One router a row."""
    title = f"{comparison.before.path} → {comparison.after.path}"
    _table(out, title, COMPARED, [], compared_rows(comparison))
    for note in (*comparison.before.notes, *comparison.after.notes):
        out.print(f"  {note}", markup=False)
    _candidates(out, candidates(comparison.after.gates, comparison))


def show_over_time(out: Any, reports: Sequence[CheckpointReport], drifts: Sequence[Comparison]) -> None:
    """One checkpoint a row, then the gates of the last."""
    _table(out, f"{len(reports)} checkpoints, medians over gates", OVER_TIME, [], over_time_rows(reports, drifts))
    show_inspection(out, reports[-1])


def show_data(out: Any, told: Mapping[str, Mapping[str, Any]]) -> None:
    """One gate a row: what a batch made of it."""
    _table(out, "With data: medians over tokens, and the share whose choice rounding changes", WITH_DATA, [], data_rows(told))


def _candidates(out: Any, told: list[tuple[str, str, str]], limit: int = 20) -> None:
    if told:
        out.print("candidates for merging or pruning, to be tried on data:", markup=False)
    for label, deed, reason in told[:limit]:
        out.print(f"  {label}: {deed} ({reason})", markup=False)
    if len(told) > limit:
        out.print(f"  and {len(told) - limit} more (--json has all)", markup=False)


def _table(out: Any, title: str, head: Sequence[str], usual: list[list[str]], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    kept = _fitting(head, [*usual, *rows], out.width)
    head = [head[column] for column in kept]
    usual, rows = ([[row[column] for column in kept] for row in part] for part in (usual, rows))
    table = Table(box=SIMPLE, pad_edge=False, header_style="bold")
    for name in head:
        left = name in ("gate", "checkpoint") or name.startswith("verdict")
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in usual:
        table.add_row(*(Text(cell) for cell in row), style="dim")
    for row in rows:
        word = row[-1].partition(" ")[0].strip(";")
        style = _STYLES.get(word, "red") if head[-1].startswith("verdict") else ""
        table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style))
    out.print(Text(title, style="bold"))
    out.print(table)


def _fitting(head: Sequence[str], rows: list[list[str]], width: int) -> list[int]:
    """The columns for which there is room."""

    def needs(column: int) -> int:
        cells = [len(row[column]) for row in rows] + [len(head[column])]
        return (min(max(cells), _VERDICT) if head[column].startswith("verdict") else max(cells)) + 3

    def importance(column: int) -> int:
        return _WANTED.index(head[column]) if head[column] in _WANTED else len(_WANTED) + column

    kept = list(range(len(head)))
    while len(kept) > 2 and sum(map(needs, kept)) > width:
        kept.remove(max(kept, key=importance))
    return kept
