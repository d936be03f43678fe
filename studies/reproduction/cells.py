"""How numbers are written in the tables, and what they allow to say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from examples.shared.runs import interval
from studies.verdicts import CERTAIN, SHOWN

from .statistics import Difference, side

NOTHING = "–"


def level(values: Iterable[float], form: str, of: int | None = None) -> str:
    """Mean ± half-width of the 95 % interval, and where they are not all of `of`, how many values there are."""
    values = list(values)
    counted = "" if of is None or len(values) == of else f" ({len(values)} of {of})"
    if not values:
        return NOTHING + counted
    summary = interval(list(values))
    return _spread(summary["mean"], summary["ci95"], form) + counted


def gap(difference: Difference | None, of: int | None = None) -> str:
    """A paired difference, as `level`; a small one that nearly excludes 0, or only just does, to three decimals."""
    if difference is None:
        return NOTHING
    form = "+.3f" if difference.p is not None and 0.03 <= difference.p <= 0.08 and abs(difference.mean) < 1 else "+.2f"
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


def words(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; words stand better at the left."""
    return table(head, rows).replace("---:", "---")


def verdict(difference: Difference | None, better: str = "**shown**", worse: str = "**refuted**") -> str:
    if difference is None:
        return "no runs"
    if not difference.enough:
        return f"{SHOWN[0]}, too few ({difference.n} of {difference.of})"
    return {1: better, -1: worse, 0: SHOWN[0]}[side(difference)]


def numbers(difference: Difference | None) -> str:
    if difference is None:
        return "no pair of seeds"
    return f"{gap(difference)}, {chance(difference.p)}, n {difference.n}"


def said(difference: Difference | None, better: str = "**shown**", worse: str = "**refuted**") -> str:
    return f"{verdict(difference, better, worse)}: {numbers(difference)}"


def span(values: Iterable[float], form: str) -> str:
    """ "As "+0.15 to +1.05", or one number where the ends are written alike."""
    values = list(values)
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def together(verdicts: Sequence[str]) -> str:
    """The verdict that all share, or how often each was reached."""
    counts = {one: verdicts.count(one) for one in dict.fromkeys(verdicts)}
    return next(iter(counts), "no runs") if len(counts) < 2 else "; ".join(f"{one} in {n}" for one, n in counts.items())


def expected(differences: Iterable[Difference | None]) -> str:
    intervals = sum(found is not None and found.enough for found in differences)
    return f"{intervals} intervals: {CERTAIN * intervals:.1f} of them would be expected to exclude 0 if nothing differed."


def _spread(mean: float, half: float | None, form: str) -> str:
    shown = round(mean, int(form[-2])) + 0.0  # a rounded -0.0 becomes 0.0
    return f"{shown:{form}}" + ("" if half is None else f" ± {half:{form.lstrip('+')}}")
