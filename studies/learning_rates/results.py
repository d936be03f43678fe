"""Saved runs -> numbers by model, arm, rate and seed, and the outcomes of each seed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

from studies.saved import Results

BASE = "none"
Values = dict[int, float]  # by seed


class Outcome(NamedTuple):
    """Lower is better for all of them."""

    name: str
    says: str
    form: str


OUTCOMES = (
    Outcome("best", "loss at the arm's own best rate, nats/byte", ".3f"),
    Outcome("twice", "loss at twice that rate", ".3f"),
    Outcome("four times", "loss at four times that rate", ".3f"),
    Outcome("sensitivity", "mean loss over all rates above the best one", ".3f"),
    Outcome("dead", "dead experts at the best rate", ".1f"),
    Outcome("flips", "choices that bfloat16 changes at the best rate, %", ".2f"),
)


class Arms:
    """The test runs of one model."""

    def __init__(self, results: Results, model: str) -> None:
        self.protocol = results["protocol"]
        self.model = model
        self.rates: list[float] = self.protocol["rates"]["all"]
        self._runs: dict[tuple[str, float, int], dict[str, Any]] = {
            (run["arm"], run["rate"], run["seed"]): run
            for run in results["runs"]
            if run["stage"] == "test" and run["model"] == model
        }
        seeds = sorted({seed for _, _, seed in self._runs})
        self.arms = [arm for arm in self.protocol["arms"] if any(arm == of for of, _, _ in self._runs)]
        # of a study that is not finished: the seeds that are whole
        self.seeds = [
            seed for seed in seeds if all((arm, rate, seed) in self._runs for arm in self.arms for rate in self.rates)
        ]

    @property
    def experts(self) -> int:
        """Of all layers together."""
        settings = self.protocol["settings"] | self.protocol["models"][self.model]
        return int(settings["experts"] * settings["layers"])

    def strength(self, arm: str) -> float:
        """The one that was chosen; 0 for an arm without one."""
        return float(self._runs[arm, self.rates[0], self.seeds[0]]["strength"])

    def values(self, arm: str, rate: float, name: str = "loss") -> Values:
        return {seed: float(self._runs[arm, rate, seed][name]) for seed in self.seeds}

    def diverged(self, arm: str) -> int:
        return sum(self._runs[arm, rate, seed]["diverged"] for rate in self.rates for seed in self.seeds)

    def best_rate(self, arm: str, without: int | None = None) -> float:
        """The rate of the lowest mean loss, over the seeds but one."""
        seeds = [seed for seed in self.seeds if seed != without] or self.seeds
        return min(self.rates, key=lambda rate: fmean(self.values(arm, rate)[seed] for seed in seeds))

    def outcome(self, arm: str, name: str) -> Values:
        """By seed. Where the rate that is asked for lies beyond the last one, the seed is left out."""
        return {
            seed: value for seed in self.seeds if (value := _OF[name](self, arm, seed, self.best_rate(arm, seed))) is not None
        }


def _beyond(factor: float) -> Callable[[Arms, str, int, float], float | None]:
    def value(arms: Arms, arm: str, seed: int, best: float) -> float | None:
        rate = next((rate for rate in arms.rates if abs(rate / (factor * best) - 1) < 1e-6), None)
        return None if rate is None else arms.values(arm, rate)[seed]

    return value


def _sensitivity(arms: Arms, arm: str, seed: int, best: float) -> float:
    return fmean(arms.values(arm, rate)[seed] for rate in arms.rates) - arms.values(arm, best)[seed]


_OF: dict[str, Callable[[Arms, str, int, float], float | None]] = {
    "best": _beyond(1),
    "twice": _beyond(2),
    "four times": _beyond(4),
    "sensitivity": _sensitivity,
    "dead": lambda arms, arm, seed, best: arms.values(arm, best, "dead")[seed],
    "flips": lambda arms, arm, seed, best: 100 * arms.values(arm, best, "flips")[seed],
}
