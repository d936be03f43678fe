"""What the paper claims, and by a fixed rule what this run says of it.

A comparison is a difference of two groups of arms, paired by seed: a group's value for a seed is the mean over its arms.
It is "shown" if the 95 % interval of the mean difference (Student's t) lies wholly on the claimed side of zero,
"refuted" if wholly on the other, else "not shown". A claim is what all its comparisons are, if they agree; "mixed" if some are
shown and some refuted; "partly shown" or "partly refuted" if the rest is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from examples.shared.runs import interval
from studies.verdicts import SHOWN

GROUPS = {"soft": ("importance", "kl"), "hard": ("relative", "mean")} | {arm: (arm,) for arm in ("none", "quiet", "plain")}


class Claim(NamedTuple):
    text: str
    group: str
    others: tuple[str, ...]
    quantities: dict[str, int]  # name in the summary -> the claimed sign of the difference


CLAIMS = (
    Claim(
        "Soft constraints use the experts more evenly",
        "soft",
        ("none", "hard"),
        {"importance_cv2": -1, "load_cv2": -1, "experts_used": 1},
    ),
    Claim(
        "Soft constraints make experts specialise more",
        "soft",
        ("none", "hard"),
        {"purity": 1, "mutual_information": 1},
    ),
    Claim("Hard constraints keep experts more general", "hard", ("quiet", "soft"), {"fixed_used": 1}),
    Claim("Hard constraints give the higher accuracy", "hard", ("plain", "quiet", "none", "soft"), {"accuracy": 1}),
)
Rows = dict[str, list[dict[str, float | None]]]


def judge(rows: Rows) -> list[dict[str, Any]]:
    """rows: for each arm, for each seed, its scalars. Comparisons of which an arm was not run are left out."""
    judged = []
    for claim in CLAIMS:
        comparisons = [
            _compare(rows, claim.group, other, name, sign)
            for other in claim.others
            for name, sign in claim.quantities.items()
            if all(arm in rows for group in (claim.group, other) for arm in GROUPS[group])
        ]
        judged.append({"claim": claim.text, "verdict": overall([one["verdict"] for one in comparisons]), "rows": comparisons})
    return judged


def verdict(difference: dict[str, Any], sign: int) -> str:
    mean, half = sign * difference["mean"], difference["ci95"]
    if half is None or not (mean - half > 0 or mean + half < 0):  # NaN, of a diverged run, is not shown either
        return SHOWN[0]
    return SHOWN[1 if mean > 0 else -1]


def overall(verdicts: Sequence[str]) -> str:
    found = set(verdicts)
    if not found:
        return "not run"
    if len(found) == 1:
        return verdicts[0]
    if {SHOWN[1], SHOWN[-1]} <= found:
        return "mixed"
    return f"partly {SHOWN[1] if SHOWN[1] in found else SHOWN[-1]}"


def _compare(rows: Rows, group: str, other: str, name: str, sign: int) -> dict[str, Any]:
    pairs = zip(_of_group(rows, group, name), _of_group(rows, other, name), strict=True)
    difference = interval([None if mine is None or theirs is None else mine - theirs for mine, theirs in pairs])
    return {
        "comparison": f"{group} - {other}",
        "quantity": name,
        "claimed": "above 0" if sign > 0 else "below 0",
        **difference,
        "verdict": verdict(difference, sign),
    }


def _of_group(rows: Rows, group: str, name: str) -> list[float | None]:
    """For each seed the mean over the arms of the group."""
    found: list[float | None] = []
    for of_seed in zip(*(rows[arm] for arm in GROUPS[group]), strict=True):
        values = [row[name] for row in of_seed]
        known = [value for value in values if value is not None]
        found.append(sum(known) / len(known) if len(known) == len(values) else None)
    return found
