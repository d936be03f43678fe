"""Every network at the edge, and accuracy against rate; an arm has one colour in both."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shared.figures import lanes
from examples.shared.palette import color
from examples.shared.runs import interval
from studies.saved import Results

from .results import TRAINED, Runs

SLOWER = ", gate rate / 10"  # has the colour of the arm that it is added to
DRAWN = ("linear", "linear+balance", "prototypes+balance", "spectral", "linear+balance, residual")  # at the edge, from above
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


def edge(results: Results) -> Figure:
    """A column of panels for each data set, a row for each depth and rate at the edge, a dot for each network of five arms."""
    runs = Runs(results)
    at_edge = [runs.conditions[name] for name in runs.edge()]
    found = {(one.phase, one.changes["layers"], one.changes["lr"]): one.name for one in at_edge}
    data = list(dict.fromkeys(phase for phase, _, _ in found))
    places = sorted({key[1:] for key in found}, key=lambda key: (key[0], -key[1]))
    figure, axes = plt.subplots(
        len(places), len(data), figsize=(3.4 * len(data) + 1.9, 1.37 * len(places) + 0.4), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, phase in zip(axes.T, data, strict=True):
        for axis, (layers, rate) in zip(column, places, strict=True):
            name = found.get((phase, layers, rate))
            if name is None:
                axis.set_visible(False)
            else:
                _networks(axis, runs, name)
                axis.set_title(f"{phase}: {layers} layers, rate {_short(rate)}", fontsize=9.5)
    axes[0, 0].set_xlim(0, 118)
    axes[0, 0].set_xticks([0, 50, 100], ["0", "50", "100"])
    axes[0, 0].set_yticks(range(len(DRAWN))[::-1], DRAWN)
    figure.supxlabel(
        f"test accuracy, %; a dot is a network; from the line on, {TRAINED} times chance, it has trained (right: how many)",
        fontsize=9,
    )
    return figure


def _networks(axis: Axes, runs: Runs, name: str) -> None:
    limit = TRAINED * runs.chance(runs.conditions[name].phase)
    axis.axvline(limit, color="gray", linewidth=0.8, zorder=1)
    for place, arm in enumerate(DRAWN[::-1]):
        values = list(runs.accuracy(arm, name).values())
        paint = color(arm)
        axis.scatter(values, place + lanes(values, 0.55), s=9, color=paint, alpha=0.7, linewidths=0, zorder=2)
        axis.text(117, place, f"{runs.trained(arm, name)}/{len(values)}", ha="right", va="center", fontsize=7, color=paint)
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.spines[["top", "right"]].set_visible(False)


def accuracy(results: Results) -> Figure:
    """A panel for each depth of which several rates were tried, an arm a curve."""
    runs = Runs(results)
    panels = {key: of_rates for key in runs.panels if len(of_rates := runs.panel(*key)) > 1}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.5 * rows + 0.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((phase, layers), of_rates) in zip(axes.flat, panels.items(), strict=False):
        for arm, line in STYLES.items():
            points = [interval(list(runs.accuracy(arm, one.name).values())) for one in of_rates.values()]
            means = [point["mean"] for point in points]
            paint = color(arm.removesuffix(SLOWER))
            axis.plot(list(of_rates), means, color=paint, linestyle=line, label=arm, linewidth=1.8, marker="o", markersize=3)
        axis.axhline(runs.chance(phase), color="#CCCCCC", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(list(of_rates), [_short(rate) for rate in of_rates])
        axis.margins(x=0.15)
        axis.minorticks_off()
        axis.set_title(f"{phase}, {layers} layers", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("test accuracy, %, mean of all networks (grey line: chance)", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8, frameon=False, handlelength=3.2)
    return figure


def _short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


FIGURES: dict[str, Any] = {"trainability": edge, "trainability_accuracy": accuracy}
