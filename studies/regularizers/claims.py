"""The papers' claims, and the rule that says of each whether the seeds show it.

For every seed the two arms of a claim share split, initial weights and batches, and the claim is about the mean of their
difference. With its 95 % interval (Student's t over the seeds):

- "shown": the whole interval is on the claimed side of 0.
- "refuted": the whole interval is on the other side.
- "not shown": it holds 0, or there is none, as with one seed or a run that diverged.

An exact sign test is printed beside it; with n seeds its p is at least 2^(1-n), 0.06 for five, so it decides nothing alone.
Each claim is judged by itself: of twenty true zeros, one interval is expected to leave 0 out.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from examples.shared.runs import interval


class Claim(NamedTuple):
    """`metric` is lower, or higher, with `arm` than with `against`."""

    arm: str
    against: str
    metric: str
    direction: Literal["lower", "higher"]


_SENSITIVITY: tuple[tuple[str, Literal["lower", "higher"]], ...] = (
    ("gap_accuracy", "lower"),
    ("gap_loss", "lower"),
    ("gradient_norm", "lower"),
    ("mean_noise_accuracy", "higher"),
)
_PROJECTED = ("comhe-random", "comhe-angle", "comhe-adversarial")

# CoMHE is held against the half-space MHE that it projects. Each has the coefficient that was chosen for it.
CLAIMS: dict[str, list[Claim]] = {
    "norm": [
        Claim("spectral-norm", against, metric, direction)
        for against in ("none", "weight-decay")
        for metric, direction in _SENSITIVITY
    ],
    "energy": [
        Claim("mhe", "none", "test_accuracy", "higher"),
        Claim("mhe-half", "none", "test_accuracy", "higher"),
        *(Claim(arm, "none", "test_accuracy", "higher") for arm in _PROJECTED),
        *(Claim(arm, "mhe-half", "test_accuracy", "higher") for arm in _PROJECTED),
    ],
}


def judge(claim: Claim, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The paired difference `arm` - `against` over the seeds, its tests, and the verdict."""
    differences = paired(runs[claim.arm], runs[claim.against], claim.metric)
    found = interval(differences)
    return {
        **claim._asdict(),
        **found,
        "differences": differences,
        "t_test_p": t_test(differences),
        "sign_test_p": sign_test(differences),
        "verdict": verdict(found["mean"], found["ci95"], claim.direction),
    }


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]], metric: str) -> list[float | None]:
    """First minus second, seed by seed; None where a run diverged."""
    pairs = zip(first, second, strict=True)
    return [None if None in (a[metric], b[metric]) else a[metric] - b[metric] for a, b in pairs]


def verdict(mean: float, ci95: float | None, direction: str) -> str:
    if ci95 is None:
        return "not shown: one seed has no interval"
    if not math.isfinite(mean) or not math.isfinite(ci95):
        return "not shown: a run diverged"
    towards = mean if direction == "higher" else -mean
    if towards - ci95 > 0:
        return "shown"
    return "refuted" if towards + ci95 < 0 else "not shown: the interval holds 0"


def sign_test(differences: list[float | None]) -> float | None:
    """Two-sided p of an exact sign test; zeros tell nothing and are left out."""
    from scipy.stats import binomtest

    if any(value is None or not math.isfinite(value) for value in differences):
        return None
    signs = [value > 0 for value in differences if value]
    return float(binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0


def t_test(differences: list[float | None]) -> float | None:
    """Two-sided p of Student's t test of a mean of 0; None where it cannot be told."""
    from scipy.stats import t

    known = [value for value in differences if value is not None and math.isfinite(value)]
    if len(known) < len(differences) or len(known) < 2:
        return None
    error = stdev(known) / len(known) ** 0.5
    if error == 0:
        return 1.0 if fmean(known) == 0 else 0.0
    return float(2 * t.sf(abs(fmean(known)) / error, len(known) - 1))
