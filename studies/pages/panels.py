"""A picture of means and intervals: a row an arm, a column a quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.shared.palette import color

from .tables import Cell

WIDTH = 8.6  # inches: in the column of a page the letters stay legible


def panels(
    quantities: Mapping[str, Mapping[str, Cell]],
    arms: Sequence[str],
    *,
    marks: Mapping[str, float] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    height: float = 0.34,
    names: Mapping[str, str] | None = None,
    heads: Mapping[str, str] | None = None,
    absent: str = "not measured",
    note: str = "diamond: mean; bar: its 95 % interval",
) -> Figure:
    """By title, by arm. `marks` draws a line at a value of a quantity, what lies beyond `limits` is written at the edge, and
    `names` are what rows are called instead; `heads` stand in bold above the row that they are given for. `absent` is
    written where there is no number."""
    marks, limits, names, heads = marks or {}, limits or {}, names or {}, heads or {}
    rows: list[str] = []
    for arm in arms:
        rows += [heads[arm], arm] if arm in heads else [arm]
    bold = set(heads.values())
    figure, grid = plt.subplots(
        1, len(quantities), figsize=(WIDTH, 1.1 + height * len(rows)), sharey=True, layout="constrained", squeeze=False
    )
    for axes, (title, cells) in zip(grid[0], quantities.items(), strict=True):
        low, high = limits.get(title, (float("-inf"), float("inf")))
        for place, arm in enumerate(reversed(rows)):
            if arm in bold:
                axes.axhline(place + 0.5, color="#DDDDDD", linewidth=0.8)
                continue
            found = cells.get(arm)
            if found is None:
                axes.text(0.03, place, absent, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color="#999999")
                continue
            if not low <= found.mean <= high:
                edge, side = (0.02, "left") if found.mean < low else (0.98, "right")
                told = f"◀ {found}" if found.mean < low else f"{found} ▶"
                axes.text(edge, place, told, transform=axes.get_yaxis_transform(), ha=side, va="center", fontsize=8,
                          color=color(arm))  # fmt: skip
                continue
            axes.errorbar(found.mean, place, xerr=found.half or 0, fmt="D", color=color(arm), markersize=5, capsize=2)
        if title in marks:
            axes.axvline(marks[title], color="gray", linewidth=0.8)
        if title in limits:
            axes.set_xlim(low, high)
        axes.set_title(fill(title, 90 // len(quantities)), fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="x", labelsize=8)
    grid[0, 0].set_yticks(range(len(rows)), [names.get(arm, arm) for arm in reversed(rows)], fontsize=9)
    for row, label in zip(reversed(rows), grid[0, 0].get_yticklabels(), strict=True):
        label.set_fontweight("bold" if row in bold else "normal")
    grid[0, 0].set_ylim(-0.6, len(rows) - 0.4)
    figure.supxlabel(fill(note, 110), fontsize=8)
    return figure
