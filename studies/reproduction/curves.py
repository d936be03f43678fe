"""What updates teach and what they cost, by rate."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shared.runs import interval

from . import statistics as stats
from .palette import MARKERS, ROUTERS
from .statistics import Results, Rule
from .tables import routers_of

SHOWN = {"learned": "novel loss taken away, %", "mean_delta": "mean delta, points"}


def plasticity(results: Results, phase: str) -> Figure:
    """A column a rule; above what is learned, below what it costs."""
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    figure, grid = plt.subplots(
        2, len(rules), figsize=(1 + 3 * len(rules), 5.6), layout="constrained", squeeze=False, sharex="col"
    )
    for column, rule in enumerate(rules):
        for axes, name in zip(grid[:, column], SHOWN, strict=True):
            _curves(axes, results, phase, rule, name)
        grid[0, column].axhline(100 * rule["plasticity"], color="gray", linestyle=":", linewidth=1)
        grid[0, column].set_title(rule["name"], fontsize=10)
        grid[1, column].set_xlabel("rate", fontsize=9)
    for axes, told in zip(grid[:, 0], SHOWN.values(), strict=True):
        axes.set_ylabel(told, fontsize=9)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{phase}: what updates teach and what they cost (bars: 95 % interval; dotted: compared here)")
    return figure


def _curves(axes: Axes, results: Results, phase: str, rule: Rule, name: str) -> None:
    rates = sorted(rule["rates"])
    routers = routers_of(results, phase)
    for number, (router, marker) in enumerate(zip(routers, MARKERS, strict=False)):
        records = stats.trained(results, stats.select(results, "main", phase, router))
        points = []
        for place, rate in enumerate(rates):
            values = list(stats.known(records, stats.point(rule, rate, name)).values())
            if values:
                summary, scale = interval(list(values)), 100 if name == "learned" else 1
                aside = 0.08 * (number - (len(routers) - 1) / 2)  # so that bars do not cover each other
                points.append((place + aside, scale * summary["mean"], scale * (summary["ci95"] or 0.0)))
        if points:
            x, y, half = np.array(points).T
            axes.errorbar(
                x, y, half, fmt=f"-{marker}", color=ROUTERS[router], markersize=4, linewidth=1, capsize=2, label=router
            )
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
