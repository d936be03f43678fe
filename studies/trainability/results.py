"""Saved runs -> accuracies by arm and condition; tests against the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from studies.queue import records
from studies.reproduction import saved
from studies.reproduction.protocol import STAGE_OF_CONDITIONS, Condition, conditions
from studies.reproduction.statistics import Difference, paired
from studies.saved import Results
from studies.verdicts import holm, of_effect

RESULTS = Path(__file__).with_name("results.json")
TRAINED = 2  # times chance, from which on a network counts as trained
KEPT = ("stage", "phase", "arm", "seed", "accuracy")


class Test(NamedTuple):
    arm: str
    condition: str
    trained: tuple[int, int]  # of the arm, of its control
    of: int  # seeds
    fisher: float  # corrected
    difference: Difference | None  # of accuracy
    p: float | None  # corrected

    @property
    def trains(self) -> str:
        return of_effect(self.fisher, self.trained[0] - self.trained[1])

    @property
    def better(self) -> str:
        return of_effect(self.p, 0.0 if self.difference is None else self.difference.mean)


def gather(protocol: dict[str, Any], out: Path) -> Results:
    """What is saved in the repository: as of the reproduction; of a run of a condition the few numbers that the page needs."""
    results = saved.gather(protocol, records(out))
    return {**results, "runs": [_short(run) if run["stage"] == STAGE_OF_CONDITIONS else run for run in results["runs"]]}


def _short(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in KEPT} | {"routing": {"top_path_share": run["routing"]["top_path_share"]}}


class Runs:
    """Those of the conditions; of a study that is not finished, the seeds that every arm has."""

    def __init__(self, results: Results) -> None:
        self.protocol = results["protocol"]
        self.arms = list(self.protocol[STAGE_OF_CONDITIONS]["arms"])
        self._of = {(run["arm"], run["seed"]): run for run in results["runs"] if run["stage"] == STAGE_OF_CONDITIONS}
        self._seeds = {one.name: self._whole(one) for one in conditions(self.protocol)}
        self.conditions = {one.name: one for one in conditions(self.protocol) if self._seeds[one.name]}

    def _whole(self, condition: Condition) -> list[int]:
        first = self.protocol[STAGE_OF_CONDITIONS]["seeds"][0]
        wanted = range(first, first + condition.seeds)
        return [seed for seed in wanted if all((f"{arm}, {condition.name}", seed) in self._of for arm in self.arms)]

    def seeds(self, condition: str) -> list[int]:
        return self._seeds[condition]

    def edge(self) -> list[str]:
        """The conditions that have the stage's number of seeds, not fewer."""
        most = self.protocol[STAGE_OF_CONDITIONS]["seeds"][1]
        return [name for name, one in self.conditions.items() if one.seeds == most]

    @property
    def panels(self) -> list[tuple[str, int]]:
        """(data, layers), as in the protocol."""
        return list(dict.fromkeys((one.phase, one.changes["layers"]) for one in self.conditions.values()))

    def panel(self, phase: str, layers: int) -> dict[float, Condition]:
        """By rate."""
        of_panel = (one for one in self.conditions.values() if (one.phase, one.changes["layers"]) == (phase, layers))
        return {one.changes["lr"]: one for one in of_panel}

    def chance(self, phase: str) -> float:
        """In %."""
        classes = self.protocol["data"][self.protocol["main"]["phases"][phase]["data"]]["classes"]
        return 100 / len(classes)

    def accuracy(self, arm: str, condition: str) -> dict[int, float]:
        return {seed: self._of[f"{arm}, {condition}", seed]["accuracy"] for seed in self.seeds(condition)}

    def trained(self, arm: str, condition: str) -> int:
        from_here = TRAINED * self.chance(self.conditions[condition].phase)
        return sum(value >= from_here for value in self.accuracy(arm, condition).values())

    def one_path(self, arm: str, condition: str) -> int:
        limit = self.protocol["failed"]["one_path"]
        of_arm = (self._of[f"{arm}, {condition}", seed] for seed in self.seeds(condition))
        return sum((run["routing"]["top_path_share"] or 0.0) >= limit for run in of_arm)


def control(arm: str) -> str | None:
    """Which arm an arm is tested against: the one that it adds something to."""
    if arm == "linear+balance":
        return None
    return "linear+balance" if arm.startswith("linear") or arm == "prototypes+balance" else "prototypes+balance"


def tests(runs: Runs) -> list[Test]:
    """Every arm against its control in every condition; both families of p adjusted by Holm."""
    from scipy.stats import fisher_exact

    cells = [(arm, condition) for arm in runs.arms if control(arm) for condition in runs.conditions]
    found = []
    for arm, condition in cells:
        other, n = str(control(arm)), len(runs.seeds(condition))
        counts = runs.trained(arm, condition), runs.trained(other, condition)
        fisher = float(fisher_exact([[counts[0], n - counts[0]], [counts[1], n - counts[1]]]).pvalue)
        found.append((counts, n, fisher, paired(runs.accuracy(arm, condition), runs.accuracy(other, condition))))
    fishers = holm([fisher for _, _, fisher, _ in found])
    ps = holm([None if difference is None else difference.p for *_, difference in found])
    return [
        Test(*cell, counts, n, float(fisher or 0.0), difference, p)
        for cell, (counts, n, _, difference), fisher, p in zip(cells, found, fishers, ps, strict=True)
    ]
