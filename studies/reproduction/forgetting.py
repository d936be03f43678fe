"""What an update costs: where routers are compared, and at the largest rate of each rule."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shared.palette import color
from examples.shared.runs import interval

from . import statistics as stats
from .statistics import Quantity, Results
from .tables import phase_title, routers_of

LABELS = ("where all have learned\nequally much", "at the largest rate\nof each rule")  # of the rows


def forgetting(results: Results, phase: str) -> Figure:
    """A column a rule; above where updates teach equally much, below at the largest rate. One scale, so that harm is seen."""
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    routers = routers_of(results, phase)
    size = (1.6 + 1.8 * len(rules), 1.2 + 0.5 * len(routers))
    figure, grid = plt.subplots(2, len(rules), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True)
    for column, rule in enumerate(rules):
        largest = max(rule["rates"])
        _row(grid[0, column], results, phase, stats.equal(rule))
        _row(grid[1, column], results, phase, stats.point(rule, largest, "mean_delta"))
        grid[0, column].set_title(f"{rule['name']}\n{rule['plasticity']:.0%} of the loss learned", fontsize=9.5)
        grid[1, column].set_title(f"rate {largest:g}", fontsize=9)
    for axes, label in zip(
        grid[:, 0], ("where all have learned\nequally much", "at the largest rate\nof each rule"), strict=True
    ):
        axes.set_ylabel(label, fontsize=9.5)
        axes.set_yticks(range(len(routers)), list(reversed(routers)), fontsize=8)
        axes.set_ylim(-0.6, len(routers) - 0.4)
    seeds = len(stats.select(results, "main", phase, routers[0]))
    figure.suptitle(f"{phase_title(results, phase)}: {seeds} seeds", fontsize=9.5)
    figure.supxlabel(
        "change of test accuracy by one update on a novel image, points: mean and 95 % interval\n"
        "left of 0: the update has made the network forget; right: it has taught more than the image",
        fontsize=9,
    )
    return figure


def _row(axes: Axes, results: Results, phase: str, quantity: Quantity) -> None:
    for place, router in enumerate(reversed(routers_of(results, phase))):
        records = stats.trained(results, stats.select(results, "main", phase, router))
        values = list(stats.known(records, quantity).values())
        if not values:
            axes.text(0, place, "not reached", ha="center", va="center", fontsize=7)
            continue
        summary = interval(list(values))
        axes.errorbar(summary["mean"], place, xerr=summary["ci95"] or 0, fmt="D", color=color(router), markersize=5, capsize=2)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
