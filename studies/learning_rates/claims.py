"""Who is better than doing nothing, and what that says: rules fixed before the test runs.

An arm against `none`: paired t test over the seeds, Holm's correction over the arms of one model and outcome. Shown: corrected
p below 0.05 and lower; refuted: below 0.05 and higher; not shown: anything else.

Of a model and an outcome the claim that survives is
- "spectral control", if an arm of ours is shown and, against each rival that is shown too, lower with p below 0.05 (Holm);
- "any control of the gate", if an arm of ours and a rival are shown and no arm of ours is ahead of all of them;
- "a rival's", if only rivals are shown;
- "nothing", if none is.
"""

from __future__ import annotations

from typing import NamedTuple

from studies import verdicts
from studies.reproduction.statistics import Difference, paired
from studies.verdicts import CERTAIN, SHOWN, holm

from .results import BASE, OUTCOMES, Arms

OURS = ("spread", "norm", "rank", "decoupled", "both")


class Test(NamedTuple):
    """An arm against another one; `p` is corrected."""

    arm: str
    difference: Difference | None
    p: float | None

    @property
    def verdict(self) -> str:
        """Lower is better."""
        return verdicts.of_effect(self.p, 0.0 if self.difference is None else -self.difference.mean)


def against_none(arms: Arms, outcome: str) -> dict[str, Test]:
    return _tests(arms, [arm for arm in arms.arms if arm != BASE], BASE, outcome)


def ahead(arms: Arms, arm: str, rivals: list[str], outcome: str) -> bool:
    """Whether the arm is lower than each of the rivals."""
    mine = arms.outcome(arm, outcome)
    differences = [paired(mine, arms.outcome(rival, outcome)) for rival in rivals]
    ps = holm([None if found is None else found.p for found in differences])
    return all(
        found is not None and p is not None and p < CERTAIN and found.mean < 0 for found, p in zip(differences, ps, strict=True)
    )


def survives(arms: Arms, outcome: str) -> str:
    words = {arm: test.verdict for arm, test in against_none(arms, outcome).items()}
    ours = [arm for arm, word in words.items() if arm in OURS and word == SHOWN[1]]
    rivals = [arm for arm, word in words.items() if arm not in OURS and word == SHOWN[1]]
    if not ours:
        return "a rival's" if rivals else "nothing"
    if any(ahead(arms, arm, rivals, outcome) for arm in ours):
        return "spectral control"
    return "any control of the gate"


def all_tests(arms: Arms) -> dict[str, dict[str, Test]]:
    """By outcome, then by arm."""
    return {outcome.name: against_none(arms, outcome.name) for outcome in OUTCOMES}


def _tests(arms: Arms, which: list[str], base: str, outcome: str) -> dict[str, Test]:
    reference = arms.outcome(base, outcome)
    differences = [paired(arms.outcome(arm, outcome), reference) for arm in which]
    ps = holm([None if found is None else found.p for found in differences])
    return {arm: Test(arm, found, p) for arm, found, p in zip(which, differences, ps, strict=True)}
