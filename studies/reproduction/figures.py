"""The pictures of the page, in colours that a colour-blind reader can tell apart. Figures 1 and 5 of the paper are drawings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.image_classification import figures as single
from examples.shared.figures import plain, save
from examples.shared.runs import interval

from . import statistics as stats
from .curves import plasticity
from .palette import COLORS, ROUTERS
from .statistics import Difference, Record, Results
from .sweep import sweep_arms, sweep_rule, swept
from .tables import routers_of

PAPER = ("baseline", "clustering", "spectral")
PATHS = {"photos-2x2-small": "figure 2", "photos-2x2": "figure 3", "photos-4x4": "figure 4"}  # of the paper
WIDEST = 4.0  # an interval of the sweep that is wider than so many times the usual one does not set the axis


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what the results have into `folder`."""
    with plt.rc_context({"axes.prop_cycle": cycler(color=COLORS)}):
        return save(pictures(results), results, folder)


def pictures(results: Results) -> dict[str, Callable[[Results], Figure]]:
    """What there is to draw, by the name of its file."""
    made: dict[str, Callable[[Results], Figure]] = {
        f"paths-{phase}": partial(paths, phase=phase) for phase in pictured(results)
    }
    deep = stats.deepest(results)
    if deep is not None:
        made |= {"accuracy": accuracy, "plasticity": partial(plasticity, phase=deep)}
        if _seeds(results, deep):
            made["gradients"] = partial(gradients, phase=deep)
    if stats.select(results, "sweep"):
        made["sweep"] = sweep
    if stats.select(results, "failure"):
        made["failure"] = failure
    return {f"reproduction_{name}": make for name, make in made.items()}


def pictured(results: Results) -> list[str]:
    """The phases of figures 2 to 4; where there are no photos, those that are there."""
    present = [phase for phase in results["protocol"]["main"]["phases"] if _seeds(results, phase)]
    return [phase for phase in PATHS if phase in present] or present


def paths(results: Results, phase: str) -> Figure:
    figure = single.paths(_view(results, phase, _seeds(results, phase)))
    told = f", as {PATHS[phase]}" if phase in PATHS else ""
    figure.suptitle(f"{phase}{told}: path through the layers, by class (share of the test images)")
    return figure


def gradients(results: Results, phase: str) -> Figure:
    figure = single.gradients(_view(results, phase, _seeds(results, phase)[:1]))
    updates = results["protocol"]["settings"]["novel"] * len(results["data"][phase]["classes"])
    figure.suptitle(f"{phase}: gradient norm per expert, mean over {updates} one-shot updates")
    return figure


def accuracy(results: Results) -> Figure:
    """A dot a seed; failed ones, far below, are crosses at the left edge."""
    phases = [phase for phase in results["protocol"]["main"]["phases"] if stats.select(results, "main", phase)]
    columns = min(len(phases), 2)
    rows = -(-len(phases) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 0.4 + 1.9 * rows), layout="constrained", squeeze=False)
    for axes, phase in zip(grid.flat, phases, strict=False):
        routers = routers_of(results, phase)
        _dots(axes, results, {router: stats.select(results, "main", phase, router) for router in routers})
        axes.set_title(phase, fontsize=10)
    for axes in grid.flat[len(phases) :]:
        axes.set_axis_off()
    figure.suptitle(
        "Test accuracy, %: dots are seeds, bars 95 % intervals of those that trained, crosses failed seeds (not to scale)"
    )
    return figure


def sweep(results: Results) -> Figure:
    """Differences from the center, with their intervals."""
    names = [name for name in sweep_arms(results) if name != results["protocol"]["sweep"]["center"]]
    figure, grid = plt.subplots(1, 2, figsize=(10, 1.2 + 0.26 * len(names)), sharey=True, layout="constrained")
    titles = {"accuracy": "validation accuracy, points", "delta": f"delta at equal plasticity, {sweep_rule(results)['name']}"}
    for axes, (quantity, title) in zip(grid, titles.items(), strict=True):
        found = {name: swept(results, name, quantity) for name in names}
        reach = _reach([difference for difference in found.values() if difference is not None])
        for place, name in enumerate(reversed(names)):
            _difference(axes, place, found[name], reach)
        axes.set_xlim(-reach, reach)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    grid[0].set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    grid[0].set_ylim(-0.7, len(names) - 0.3)
    center = results["protocol"]["sweep"]["center"]
    figure.suptitle(
        f"Difference from {center} as it is; right is higher (95 % intervals; coloured: without 0; arrows: beyond the axis)"
    )
    return figure


def failure(results: Results) -> Figure:
    of_stage = results["protocol"]["failure"]
    conditions = list(of_stage["conditions"])
    size = (1.5 + 1.75 * len(conditions), 0.9 + 0.3 * len(of_stage["arms"]))
    figure, grid = plt.subplots(1, len(conditions), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False)
    names = list(reversed(of_stage["arms"]))
    for axes, condition in zip(grid[0], conditions, strict=True):
        for place, name in enumerate(names):
            runs = stats.select(results, "failure", arm=f"{name}, {condition}")
            color = ROUTERS[of_stage["arms"][name]["routers"][0]]
            for run in runs:
                alone = stats.is_collapsed(results, run)
                axes.plot(run["accuracy"], place, "x" if alone else "o", color=color, markersize=6, alpha=0.75)
        axes.axvline(results["protocol"]["failed"]["accuracy_below"], color="gray", linestyle=":", linewidth=1)
        axes.set_title(condition.replace(", ", ",\n"), fontsize=9)
        axes.set_xticks([25, 50, 75, 100])
        axes.set_xlim(15, 105)
        axes.grid(axis="x", alpha=0.3)
    grid[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    grid[0, 0].set_ylim(-0.6, len(names) - 0.4)
    figure.supxlabel("test accuracy, % (left of the dotted line: failed; cross: one path takes all)", fontsize=9)
    return figure


def _view(results: Results, phase: str, seeds: list[int]) -> dict[str, Any]:
    """A phase in the form that the pictures of a single experiment read."""
    settings = results["protocol"]["main"]["phases"][phase]
    runs: dict[str, list[Record]] = {}
    for router in PAPER:
        of_router = [record for record in stats.select(results, "main", phase, router) if record["seed"] in seeds]
        if of_router:
            runs[router] = [_as_single(record) for record in of_router]
    config = {"layers": settings["layers"], "experts": settings["experts"]}
    return {"config": config, "seeds": seeds, "data": results["data"][phase], "runs": runs}


def _as_single(record: Record) -> Record:
    return record | {"oneshot": {"gradient_norm": record["gradient_norm"]}}


def _seeds(results: Results, phase: str) -> list[int]:
    """Seeds whose table of paths is kept, of all three routers."""
    kept = [
        {record["seed"] for record in stats.select(results, "main", phase, router) if "path_counts" in record["routing"]}
        for router in PAPER
        if stats.select(results, "main", phase, router)
    ]
    return sorted(set.intersection(*kept)) if kept else []


def _dots(axes: Axes, results: Results, groups: dict[str, list[Record]]) -> None:
    values = {
        name: list(stats.known(stats.trained(results, records), stats.accuracy).values()) for name, records in groups.items()
    }
    bars = {name: interval(list(kept)) for name, kept in values.items() if kept}
    ends = [bar["mean"] + sign * (bar["ci95"] or 0) for bar in bars.values() for sign in (-1, 1)]
    shown = [value for kept in values.values() for value in kept] + ends or [0.0, 100.0]
    low, high = max(min(shown), 0.0), min(max(shown), 100.0)
    margin = max(0.08 * (high - low), 0.5)
    for place, (name, records) in enumerate(reversed(groups.items())):
        kept = values[name]
        axes.plot(kept, [place] * len(kept), ".", color=ROUTERS[name], alpha=0.5)
        if kept:
            summary = interval(list(kept))
            axes.errorbar(
                summary["mean"], place, xerr=summary["ci95"] or 0, fmt="D", color=ROUTERS[name], markersize=4, capsize=2
            )
        lost = len(records) - len(kept)
        if lost:
            axes.plot(low - margin, place, "x", color=ROUTERS[name], markersize=7, markeredgewidth=2)
            axes.annotate(f"{lost} failed", (low - margin, place), (-6, 6), textcoords="offset points", fontsize=7)
    axes.set_yticks(range(len(groups)), [plain(name) for name in reversed(groups)], fontsize=8)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set_xlim(low - 2 * margin, high + margin)
    axes.grid(axis="x", alpha=0.3)


def _reach(differences: list[Difference]) -> float:
    """Half the width of an axis on which all but the very wide intervals have room."""
    ends = [abs(found.mean) + (found.half or 0.0) for found in differences]
    usual = float(np.median(ends)) if ends else 1.0
    return 1.1 * max([end for end in ends if end <= WIDEST * usual], default=1.0) or 1.0


def _difference(axes: Axes, place: int, found: Difference | None, reach: float) -> None:
    if found is None:
        axes.text(0, place, "not reached", ha="center", va="center", fontsize=7)
        return
    color = ROUTERS["spectral"] if stats.side(found) > 0 else ROUTERS["baseline"] if stats.side(found) < 0 else "#888888"
    if abs(found.mean) >= reach:  # beyond the axis: its numbers, at the edge where it lies
        sign = 1 if found.mean > 0 else -1
        axes.plot(0.97 * sign * reach, place, ">" if sign > 0 else "<", color=color)
        told = f"{found.mean:+.1f}" + ("" if found.half is None else f" ± {found.half:.1f}")
        axes.text(0.92 * sign * reach, place, told, ha="right" if sign > 0 else "left", va="center", fontsize=7)
        return
    axes.errorbar(found.mean, place, xerr=found.half or 0, fmt="o", color=color, markersize=4, capsize=2)
    for sign, marker in ((-1, "<"), (1, ">")):  # an interval that goes on beyond the axis
        if sign * found.mean + (found.half or 0.0) > reach:
            axes.plot(0.985 * sign * reach, place, marker, color=color, markersize=5)
