"""Saved runs -> accuracies by arm, depth and rate; tests against the control."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from examples.shared.runs import versions
from studies.queue import records
from studies.reproduction.statistics import Difference, paired
from studies.saved import Results
from studies.verdicts import holm, of_effect

RESULTS = Path(__file__).with_name("results.json")
KEPT = ("arm", "seed", "accuracy", "spectral_norm", "stable_rank")


class Test(NamedTuple):
    arm: str
    condition: str
    trained: tuple[int, int]  # of the arm, of its control
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
    """What is saved in the repository: of each run the few numbers that the page needs."""
    runs = [
        {name: record[name] for name in KEPT} | {"top_path_share": record["routing"]["top_path_share"]}
        for record in records(out)
    ]
    return {"protocol": protocol, "versions": versions(), "runs": runs}


class Runs:
    def __init__(self, results: Results) -> None:
        self.protocol = results["protocol"]
        of_stage = self.protocol["failure"]
        self.arms = list(of_stage["arms"])
        self.conditions: dict[str, dict[str, Any]] = of_stage["conditions"]
        self._accuracy: dict[tuple[str, int], float] = {(run["arm"], run["seed"]): run["accuracy"] for run in results["runs"]}
        self._one_path: dict[tuple[str, int], bool] = {
            (run["arm"], run["seed"]): (run["top_path_share"] or 0.0) >= self.protocol["failed"]["one_path"]
            for run in results["runs"]
        }
        # of a study that is not finished: the seeds that are whole
        self.seeds = [
            seed
            for seed in sorted({run["seed"] for run in results["runs"]})
            if all((f"{arm}, {condition}", seed) in self._accuracy for arm in self.arms for condition in self.conditions)
        ]

    @property
    def depths(self) -> list[int]:
        return sorted({settings["layers"] for settings in self.conditions.values()})

    def at_depth(self, depth: int) -> dict[float, str]:
        """Condition by rate."""
        return {s["lr"]: name for name, s in self.conditions.items() if s["layers"] == depth}

    def accuracy(self, arm: str, condition: str) -> dict[int, float]:
        return {seed: self._accuracy[f"{arm}, {condition}", seed] for seed in self.seeds}

    def trained(self, arm: str, condition: str) -> int:
        return sum(value >= self.protocol["failed"]["accuracy_below"] for value in self.accuracy(arm, condition).values())

    def one_path(self, arm: str, condition: str) -> int:
        return sum(self._one_path[f"{arm}, {condition}", seed] for seed in self.seeds)


def control(arm: str) -> str | None:
    if arm in ("linear+balance",):
        return None
    return "linear+balance" if arm.startswith("linear") or arm == "prototypes+balance" else "prototypes+balance"


def tests(runs: Runs) -> list[Test]:
    from scipy.stats import fisher_exact

    n = len(runs.seeds)
    cells = [(arm, condition) for arm in runs.arms if control(arm) for condition in runs.conditions]
    found = []
    for arm, condition in cells:
        other = str(control(arm))
        counts = runs.trained(arm, condition), runs.trained(other, condition)
        fisher = float(fisher_exact([[counts[0], n - counts[0]], [counts[1], n - counts[1]]]).pvalue)
        found.append((counts, fisher, paired(runs.accuracy(arm, condition), runs.accuracy(other, condition))))
    fishers = holm([fisher for _, fisher, _ in found])
    ps = holm([None if difference is None else difference.p for _, _, difference in found])
    return [
        Test(*cell, counts, float(fisher or 0.0), difference, p)
        for cell, (counts, _, difference), fisher, p in zip(cells, found, fishers, ps, strict=True)
    ]
