"""Loss against rate, an arm a curve."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shared.palette import color
from examples.shared.runs import interval
from studies.saved import Results

from .results import BASE, Arms

DRAWN = (BASE, "slower", "spread", "both", "balance")  # in colour, by name
OTHERS = "#D0D0D0"


def models(results: Results) -> list[str]:
    """Those with at least one whole test seed."""
    return [model for model in results["protocol"]["models"] if Arms(results, model).seeds]


def loss(results: Results) -> Figure:
    names = models(results)
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], names, strict=True):
        _panel(axis, Arms(results, model))
    axes[0, 0].set_ylabel("validation loss, nats/byte")
    return figure


def _panel(axis: Axes, arms: Arms) -> None:
    for arm in sorted(arms.arms, key=lambda arm: arm in DRAWN):
        curve = [interval(list(arms.values(arm, rate).values())) for rate in arms.rates]
        means = [point["mean"] for point in curve]
        if arm not in DRAWN:
            axis.plot(arms.rates, means, color=OTHERS, linewidth=0.8, zorder=1)
            continue
        axis.plot(arms.rates, means, color=color(arm), linewidth=2.4 if arm == BASE else 1.8, zorder=3)
        low, high = ([mean + side * (p["ci95"] or 0) for mean, p in zip(means, curve, strict=True)] for side in (-1, 1))
        axis.fill_between(arms.rates, low, high, color=color(arm), alpha=0.12, linewidth=0, zorder=2)
    _labels(axis, arms)
    axis.set_xscale("log", base=2)
    axis.set_xticks(arms.rates, [f"{rate:g}" for rate in arms.rates])
    axis.set_xlabel("learning rate")
    axis.set_title(f"{arms.model}: means of {len(arms.seeds)} seeds, band: 95 %\nthin: the other arms", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _labels(axis: Axes, arms: Arms) -> None:
    """The names at the right ends of the curves, spread so that none hides another."""
    ends = sorted((interval(list(arms.values(arm, arms.rates[-1]).values()))["mean"], arm) for arm in DRAWN if arm in arms.arms)
    low, high = axis.get_ylim()
    step, place = 0.055 * (high - low), -float("inf")
    for value, arm in ends:
        place = max(value, place + step)
        axis.annotate(
            arm,
            (arms.rates[-1], value),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=color(arm),
            va="center",
            fontsize=9,
        )
    axis.set_ylim(low, high)


FIGURES: dict[str, Any] = {"learning_rates": loss}
