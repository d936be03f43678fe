"""The differences that the paper prints beside ours: whether "not shown" leaves room for them."""

from __future__ import annotations

from typing import NamedTuple

from . import statistics as stats
from .cells import gap, table
from .statistics import Difference, Quantity, Results
from .tables import ABSENT, PRINTED

PAIRS = (("spectral", "baseline"), ("spectral", "clustering"), ("clustering", "baseline"))


class Beside(NamedTuple):
    phase: str
    pair: tuple[str, str]
    quantity: str
    paper: float
    ours: Difference

    @property
    def inside(self) -> bool:
        return self.ours.half is not None and abs(self.paper - self.ours.mean) <= self.ours.half


def sections(results: Results) -> dict[str, str]:
    found = beside(results)
    if not found:
        return {"printed": ABSENT}
    rows = []
    for phase, pair in dict.fromkeys((one.phase, one.pair) for one in found):
        row = [phase, " − ".join(pair)]
        for name in ("accuracy", "mean delta"):
            there = [one for one in found if (one.phase, one.pair, one.quantity) == (phase, pair, name)]
            row += [cell for one in there for cell in (_marked(one), gap(one.ours, of=one.ours.of))] or ["", ""]
        every = [other for one in found if (one.phase, one.pair, one.quantity) == (phase, pair, "mean delta")
                 for other in updates(results, one)]  # fmt: skip
        rows.append([*row, f"{sum(other.inside for other in every)} of {len(every)}"])
    head = ["phase", "difference", "accuracy: paper", "ours", "mean delta: paper", "ours", "all rules and rates"]
    told = (
        "In points; bold: the paper's lies inside our 95 % interval; in the last column, how many of our rules and rates hold "
        "its delta. Other photos, other updates, and the paper gives no number of runs: this tests our effects, not the paper."
    )
    return {"printed": table(head, rows) + f"\n{told}\n"}


def _marked(one: Beside) -> str:
    return f"**{one.paper:+.2f}**" if one.inside else f"{one.paper:+.2f}"


def beside(results: Results) -> list[Beside]:
    """Accuracy, and the mean delta of tables 1 and 2 (the first rule at its middle rate)."""
    made = []
    for phase in reversed(PRINTED):
        rules = stats.rules_of(results, stats.select(results, "main", phase))
        for pair in PAIRS if rules else ():
            read: Quantity = stats.point(rules[0], stats.middle(rules[0]), "mean_delta")
            for name, column, quantity in (("accuracy", 0, stats.accuracy), ("mean delta", 2, read)):
                ours = stats.compare(results, "main", phase, *pair, quantity, failed=name == "accuracy")
                one, other = (float(str(PRINTED[phase][router][column])) for router in pair)
                if ours is not None:
                    made.append(Beside(phase, pair, name, one - other, ours))
    return made


def updates(results: Results, one: Beside) -> list[Beside]:
    """The same comparison of mean delta by every rule and rate, where enough seeds have it."""
    made = []
    for rule in stats.rules_of(results, stats.select(results, "main", one.phase)):
        for rate in rule["rates"]:
            ours = stats.compare(results, "main", one.phase, *one.pair, stats.point(rule, rate, "mean_delta"))
            if ours is not None and ours.enough:
                made.append(one._replace(ours=ours))
    return made
