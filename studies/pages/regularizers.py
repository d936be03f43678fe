"""What the two studies of penalties on classifiers say: spectral norm, and energy."""

from __future__ import annotations

import re

from matplotlib.figure import Figure

from studies.verdicts import RULE

from .lines import line, section
from .panels import panels
from .tables import Cell, Tables

CLAIM = re.compile(r"(.*): (\S+) (lower|higher) than (\S+)")
GAP, GAP_LOSS = "Gap: training - test accuracy, points", "Gap: test - training loss"
SENSITIVITY, UNDER_NOISE, TEST = (
    "norm of the loss's gradient by the image (less is steadier)",
    "accuracy under noise, points (more is better)",
    "test accuracy, points (more is better)",
)  # of panels
GRADIENT, NOISE = "Norm of the input's gradient, test images", "Test accuracy under noise, mean over levels, %"
ACCURACY = "Test accuracy, %"
SIGN = {"lower": -1, "higher": 1}
SHORT = {GAP: "of accuracy, in points,", GAP_LOSS: "of loss", GRADIENT: "norm of the gradient", NOISE: "points of accuracy"}


def norm(tables: Tables) -> str:
    seeds = tables.seeds()
    claims = _claims(tables)
    texts = {
        (GAP, GAP_LOSS): "the spectral norm penalty makes the gap between training and test smaller",
        (GRADIENT,): "it makes the loss less sensitive to the image",
        (NOISE,): "it makes the network more robust to noise",
    }
    made = []
    for metrics, text in texts.items():
        found = {key: one for key, one in claims.items() if key[0] in metrics}
        sign = SIGN[next(iter(found))[2]]
        told = "; ".join(
            f"{name} " + ", ".join(f"{one} against {against}" for (metric, _, _, against), one in found.items() if metric == of)
            for of, name in SHORT.items()
            if of in metrics
        )
        made.append(f"{line(text, list(found.values()), sign, seeds)}: {told}.")
    gains = tables.named("Paired differences from none").row(ACCURACY)
    told = "; ".join(f"{arm} {one}" for arm, one in gains.items())
    made.append(f"{line('one of the penalties raises the test accuracy', list(gains.values()), 1, seeds, 'arms')}. {told}.")
    return section(made) + f"\n{RULE} {seeds} seeds; differences are paired by seed.\n"


def energy(tables: Tables) -> str:
    seeds, claims = tables.seeds(), _claims(tables)
    made = []
    for against, text in (
        ("none", "an energy penalty raises the test accuracy"),
        ("mhe-half", "its compressive forms raise it above the half-space form"),
    ):
        found = {key: one for key, one in claims.items() if key[3] == against}
        told = "; ".join(f"{arm} {one}" for (_, arm, _, _), one in found.items())
        room = max(one.mean + (one.half or 0) for one in found.values())
        made.append(
            f"{line(text, list(found.values()), 1, seeds, 'arms')}. Points − {against}: {told}; room for {room:.2f} at most."
        )
    noise = tables.named("Paired differences from none").row(NOISE)
    told = "; ".join(f"{arm} {one}" for arm, one in noise.items())
    made.append(f"{line('it costs accuracy under noise', list(noise.values()), -1, seeds, 'arms')}. {told}.")
    return section(made)


def picture_norm(tables: Tables) -> Figure:
    """Differences from no penalty, in the four quantities that the claims are about and in accuracy."""
    table = tables.named("Paired differences from none")
    titles = {
        "training − test accuracy, points (less is better)": GAP,
        SENSITIVITY: GRADIENT,
        UNDER_NOISE: NOISE,
        TEST: ACCURACY,
    }
    return _from_none(tables, {title: table.row(name) for title, name in titles.items()}, table.columns)


def picture_energy(tables: Tables) -> Figure:
    table = tables.named("Paired differences from none")
    titles = {SENSITIVITY: GRADIENT, UNDER_NOISE: NOISE, TEST: ACCURACY}
    return _from_none(tables, {title: table.row(name) for title, name in titles.items()}, table.columns)


def _from_none(tables: Tables, cells: dict[str, dict[str, Cell]], arms: list[str]) -> Figure:
    note = f"difference from no penalty, paired by seed; diamond: mean over {tables.seeds()} seeds; bar: its 95 % interval"
    return panels(cells, arms, marks=dict.fromkeys(cells, 0.0), note=note)


def _claims(tables: Tables) -> dict[tuple[str, str, str, str], Cell]:
    """Metric, arm, direction and what it is held against -> the difference."""
    found = {}
    for label, one in tables.named("Claims").column("difference").items():
        match = CLAIM.fullmatch(label)
        assert match is not None, label
        found[match[1], match[2], match[3], match[4]] = one
    return found
