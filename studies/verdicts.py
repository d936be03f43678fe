"""The words of all pages for what a study found, and the rule behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CERTAIN = 0.05
SHOWN = {1: "shown", 0: "not shown", -1: "refuted"}  # by the side of 0, seen from the claim, that an interval lies on
RULE = (
    "**Shown**: the 95 % interval lies on the claimed side of 0, and p is below .05 after Holm's adjustment for all "
    "comparisons of the line. **Refuted**: the same, on the other side. **Not shown**: neither."
)


class Test(NamedTuple):
    """One comparison: p, two-sided, and 1 where the difference is on the claimed side, -1 on the other."""

    p: float
    side: int


def of_effect(p: float | None, effect: float) -> str:
    """The word for one comparison: p is adjusted already (None: no test), `effect` above 0 on the claimed side."""
    return SHOWN[0 if p is None or p >= CERTAIN else (effect > 0) - (effect < 0)]


def word(tests: Sequence[Test], of: str) -> str:
    """Shown, refuted, or not shown; where that is only true of some of several comparisons, of how many. `of` calls them."""
    adjusted = holm([one.p for one in tests])
    certain = [one.side for one, p in zip(tests, adjusted, strict=True) if p is not None and p < CERTAIN]
    held = {SHOWN[side]: certain.count(side) for side in (1, -1) if side in certain}
    told = [name if count == len(tests) else f"{name} in {count} of {len(tests)} {of}" for name, count in held.items()]
    return ", ".join(told) or SHOWN[0]


def label(verdict: str) -> str:
    """As it begins a sentence."""
    return verdict[:1].upper() + verdict[1:]


def unbroken(text: str) -> str:
    """No line ends inside a number: not at its ±, its unit or its p."""
    for broken in (" ± ", "p .", " %"):
        text = text.replace(broken, broken.replace(" ", "\u00a0"))
    return text


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p adjusted for the number of tests, by Holm's step-down method; None, no test, stays None and does not count."""
    order = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
