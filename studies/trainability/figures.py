"""Who trains at the edge, and accuracy against rate; an arm has one colour in both."""

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
    "linear": "-",
    "linear+balance": "-",
    f"linear+balance{SLOWER}": ":",
    "linear+balance, residual": "--",
    "prototypes+balance": "-",
    f"prototypes+balance{SLOWER}": ":",
    "spectral": "-",
    "spectral, relative": "-",
}
COLUMNS = 5


def edge(results: Results) -> Figure:
    """A panel for each condition of most seeds, a bar for each arm: the share of its networks that train."""
    runs = Runs(results)
    names = runs.edge()
    rows = -(-len(names) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(11, 2.5 * rows + 0.3), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    places = list(range(len(runs.arms)))[::-1]
    for axis, name in zip(axes.flat, names, strict=False):
        n = len(runs.seeds(name))
        counts = [runs.trained(arm, name) for arm in runs.arms]
        bars = axis.barh(
            places,
            [100 * count / n for count in counts],
            color=[color(arm.removesuffix(SLOWER)) for arm in runs.arms],
            height=0.7,
        )
        axis.bar_label(bars, labels=[str(count) for count in counts], fontsize=7, padding=2)
        axis.set_title(f"{name}\n({n} seeds)", fontsize=9)
        axis.set_xlim(0, 115)
        axis.set_xticks([0, 50, 100], ["0", "50", "100"], fontsize=8)
        axis.set_yticks(places, runs.arms, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("networks that train, % (the number: how many)", fontsize=9)
    return figure


def accuracy(results: Results) -> Figure:
    """A panel for each depth of which several rates were tried, an arm a curve."""
    runs = Runs(results)
    panels = {key: of_rates for key in runs.panels if len(of_rates := runs.panel(*key)) > 1}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 * len(panels), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ((phase, layers), of_rates) in zip(axes[0], panels.items(), strict=True):
        for arm, line in STYLES.items():
            points = [interval(list(runs.accuracy(arm, one.name).values())) for one in of_rates.values()]
            means = [point["mean"] for point in points]
            paint = color(arm.removesuffix(SLOWER))
            axis.plot(list(of_rates), means, color=paint, linestyle=line, label=arm, linewidth=1.8, marker="o", markersize=3)
        axis.axhline(runs.chance(phase), color="#CCCCCC", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(list(of_rates), [f"{rate:.0e}".replace("e-0", "e-") for rate in of_rates])
        axis.minorticks_off()
        axis.set_title(f"{phase}, {layers} layers", fontsize=10)
        axis.set_xlabel("learning rate")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test accuracy, %, mean over seeds\n(grey line: chance)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    return figure


FIGURES: dict[str, Any] = {"trainability": edge, "trainability_accuracy": accuracy}
