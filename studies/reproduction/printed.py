"""The differences that the paper prints beside ours: whether an open answer leaves room for them."""

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
    for one in found:
        hold = sum(other.inside for other in updates(results, one))
        all_of = len(updates(results, one))
        rows.append(
            [
                one.phase,
                " − ".join(one.pair),
                one.quantity,
                f"{one.paper:+.2f}",
                gap(one.ours, of=one.ours.of),
                "yes" if one.inside else "**no**",
                "" if one.quantity == "accuracy" else f"{hold} of {all_of}",
            ]
        )
    head = ["phase", "difference", "of", "paper", "ours", "paper's inside our interval?", "of all our rules and rates, inside"]
    told = "Other photos, other updates, and the paper gives no number of runs: this tests our effects, not the paper."
    return {"printed": table(head, rows) + f"\n{told}\n"}


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
