"""How numbers are written in the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from examples.shared.runs import interval

from .statistics import Difference

NOTHING = "–"


def level(values: Iterable[float], form: str, of: int | None = None) -> str:
    """Mean ± half-width of the 95 % interval, and where they are not all of `of`, how many values there are."""
    values = list(values)
    counted = "" if of is None or len(values) == of else f" ({len(values)} of {of})"
    if not values:
        return NOTHING + counted
    summary = interval(list(values))
    return _spread(summary["mean"], summary["ci95"], form) + counted


def gap(difference: Difference | None, form: str = "+.2f", of: int | None = None) -> str:
    """A paired difference, as `level`."""
    if difference is None:
        return NOTHING
    counted = "" if of is None or difference.n == of else f" (n {difference.n})"
    return _spread(difference.mean, difference.half, form) + counted


def chance(p: float | None) -> str:
    if p is None:
        return "no p"
    return "p < .001" if p < 0.0005 else f"p {p:.3f}".replace("0.", ".")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first are of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _spread(mean: float, half: float | None, form: str) -> str:
    shown = round(mean, int(form[-2])) + 0.0  # a rounded -0.0 becomes 0.0
    return f"{shown:{form}}" + ("" if half is None else f" ± {half:{form.lstrip('+')}}")
