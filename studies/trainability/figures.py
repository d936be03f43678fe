"""Accuracy against rate, a panel a depth, an arm a curve."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from examples.shared.palette import color
from examples.shared.runs import interval
from studies.saved import Results

from .results import Runs

SLOWER = ", gate rate / 10"  # has the colour of the arm that it is added to
STYLES = {
    "linear+balance": "-",
    f"linear+balance{SLOWER}": ":",
    "linear+balance, residual": "--",
    "prototypes+balance": "-",
    f"prototypes+balance{SLOWER}": ":",
    "spectral": "-",
    "spectral, relative": "-",
}


def accuracy(results: Results) -> Figure:
    runs = Runs(results)
    figure, axes = plt.subplots(
        1, len(runs.depths), figsize=(3.1 * len(runs.depths), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, depth in zip(axes[0], runs.depths, strict=True):
        conditions = runs.at_depth(depth)
        for arm, line in STYLES.items():
            paint = color(arm.removesuffix(SLOWER))
            points = [interval(list(runs.accuracy(arm, condition).values())) for condition in conditions.values()]
            means = [point["mean"] for point in points]
            axis.plot(list(conditions), means, color=paint, linestyle=line, label=arm, linewidth=1.8, marker="o", markersize=3)
        axis.axhline(10, color="#CCCCCC", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(list(conditions), [f"{rate:g}" for rate in conditions])
        axis.minorticks_off()
        axis.set_title(f"{depth} layers", fontsize=10)
        axis.set_xlabel("learning rate")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"test accuracy, %, mean of {len(runs.seeds)} seeds\n(grey line: chance)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    return figure


FIGURES: dict[str, Any] = {"trainability": accuracy}
