"""What the page computes from saved runs: who failed, means with intervals, differences paired by seed, what they allow to say.

A quantity is a function of a record. Where a run has none, as a network at chance has no delta, it is None, and so left out and
not counted in `n`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any, NamedTuple

from examples.shared.runs import interval
from studies.oneshot.plasticity import interference
from studies.verdicts import CERTAIN as CERTAIN
from studies.verdicts import holm as holm

from . import choice

Record = dict[str, Any]
Results = dict[str, Any]
Rule = dict[str, Any]
Quantity = Callable[[Record], float | None]
ENOUGH = 0.8  # of the protocol's seeds: of fewer pairs nothing is said, for who is missing is no accident


class Difference(NamedTuple):
    """Mean of the differences by seed, half-width of its 95 % interval, p of the paired t test (two-sided), number of pairs."""

    mean: float
    half: float | None  # None for a single pair
    p: float | None
    n: int
    of: int = 0  # seeds that the protocol gives

    @property
    def enough(self) -> bool:
        """Whether it may be judged."""
        return self.half is not None and self.n >= ENOUGH * self.of


def select(results: Results, stage: str, phase: str | None = None, arm: str | None = None) -> list[Record]:
    """The records of a stage, or of a part of it, by seed."""
    found = [
        record
        for record in results["runs"]
        if record["stage"] == stage and phase in (None, record["phase"]) and arm in (None, record["arm"])
    ]
    return sorted(found, key=lambda record: record["seed"])


def arms(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["arm"] for record in records))


def has_failed(results: Results, record: Record) -> bool:
    """At or near chance."""
    return not (record["accuracy"] or 0.0) >= results["protocol"]["failed"]["accuracy_below"]


def is_collapsed(results: Results, record: Record) -> bool:
    """One path takes (nearly) all images."""
    share = record["routing"]["top_path_share"]  # None: its router gives no numbers
    return share is not None and bool(share >= results["protocol"]["failed"]["one_path"])


def trained(results: Results, records: Iterable[Record]) -> list[Record]:
    return [record for record in records if not has_failed(results, record)]


def accuracy(record: Record) -> float | None:
    value: float | None = record["accuracy"]
    return value


def measured(name: str) -> Quantity:
    """A figure of the routing; of one by layer, the mean over layers."""
    return lambda record: _level(record["routing"][name])


def spectrum(name: str) -> Quantity:
    return lambda record: _level(record[name])


def point(rule: Rule, rate: float, name: str) -> Quantity:
    """A figure of the one-shot updates of one rule at one rate; "delta/car" is that of a class, "learned" the share of the
    novel images' mean loss that is taken away."""

    def read(record: Record) -> float | None:
        for entry in record["oneshot"]:
            if (entry["scope"], entry["optimizer"], entry["lr"]) == (rule["scope"], rule["optimizer"], rate):
                if name == "learned":
                    before, after = entry["novel_loss_before"], entry["novel_loss_after"]
                    return None if not before or after is None else 1 - after / before
                group, _, key = name.partition("/")
                value: float | None = entry[group][key] if key else entry[group]
                return value
        return None

    return read


def equal(rule: Rule) -> Quantity:
    """Delta at equal plasticity; None where no rate reaches it."""
    return lambda record: interference(choice.curve(record, rule), rule["plasticity"])


def rules_of(results: Results, records: Sequence[Record]) -> list[Rule]:
    """The update rules that these runs were asked."""
    asked = {(entry["scope"], entry["optimizer"]) for record in records for entry in record["oneshot"]}
    return [rule for rule in results["protocol"]["oneshot"]["rules"] if (rule["scope"], rule["optimizer"]) in asked]


def middle(rule: Rule) -> float:
    rates: list[float] = sorted(rule["rates"])
    return rates[len(rates) // 2]


def known(records: Iterable[Record], quantity: Quantity) -> dict[int, float]:
    """The quantity by seed, of the runs that have it."""
    values = {record["seed"]: quantity(record) for record in records}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def paired(one: dict[int, float], other: dict[int, float]) -> Difference | None:
    """one − other over the seeds that both have; None without any."""
    from scipy.stats import t

    differences = [one[seed] - other[seed] for seed in one if seed in other]
    if not differences:
        return None
    n, summary = len(differences), interval(list(differences))
    if n == 1:
        return Difference(differences[0], None, None, 1)
    error = stdev(differences) / n**0.5
    if error == 0:  # all differences are one number
        p = 0.0 if differences[0] else 1.0
    else:
        p = float(2 * t.sf(abs(fmean(differences)) / error, n - 1))
    return Difference(summary["mean"], summary["ci95"], p, n)


def compare(
    results: Results, stage: str, phase: str | None, one: str, other: str, quantity: Quantity, *, failed: bool = False
) -> Difference | None:
    """Two arms of a stage, over the seeds that trained in both, or with `failed` over all."""
    sides = [select(results, stage, phase, arm) for arm in (one, other)]
    a, b = (known(side if failed else trained(results, side), quantity) for side in sides)
    found = paired(a, b)
    return found and found._replace(of=seeds_of(results, stage))


def seeds_of(results: Results, stage: str) -> int:
    """How many the protocol gives."""
    _, count = results["protocol"][stage]["seeds"]
    return int(count)


def within(groups: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """Correlation of pairs after the means of their group are taken off; None without spread."""
    x: list[float] = []
    y: list[float] = []
    for pairs in groups:
        for index, values in enumerate((x, y)):
            values.extend(pair[index] - fmean(pair[index] for pair in pairs) for pair in pairs)
    try:
        return correlation(x, y)
    except StatisticsError:
        return None


def side(difference: Difference | None) -> int:
    """1 if the 95 % interval lies above 0, -1 if below, 0 if it holds 0, or if too few have a say."""
    if difference is None or difference.half is None or not difference.enough:
        return 0
    return (difference.mean - difference.half > 0) - (difference.mean + difference.half < 0)


def deepest(results: Results) -> str | None:
    """The phase that the sweep is of, or in results without it the one with the most experts."""
    present = {record["phase"] for record in select(results, "main")}
    wanted: str = results["protocol"]["sweep"]["phase"]
    if wanted in present:
        return wanted
    settings = results["protocol"]["main"]["phases"]
    return max(
        (phase for phase in settings if phase in present),
        key=lambda phase: settings[phase]["layers"] * settings[phase]["experts"],
        default=None,
    )


def _level(value: Any) -> float | None:
    if not isinstance(value, list):
        return None if value is None else float(value)
    return None if any(item is None for item in value) else fmean(value)
