"""The pictures of the pages. Figures 1 and 5 of the paper are drawings; a run of the example draws its own figures 2 to 4."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.image_classification import figures as single
from examples.shared.figures import lanes, plain, save
from examples.shared.palette import NEUTRAL, color
from examples.shared.runs import interval

from . import routing
from . import statistics as stats
from .cells import span
from .failing import conditions
from .forgetting import forgetting
from .statistics import Difference, Quantity, Record, Results
from .sweep import sweep_arms, sweep_rule, swept
from .tables import phase_title, routers_of

DOTS = "dots: seeds; diamond: their mean, with its 95 % interval"
PAPER = ("baseline", "clustering", "spectral")
WIDEST = 4.0  # an interval of the sweep that is wider than so many times the usual one does not set the axis


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what the results have into `folder`."""
    return save(pictures(results), results, folder)


def pictures(results: Results) -> dict[str, Callable[[Results], Figure]]:
    """What there is to draw, by the name of its file."""
    made: dict[str, Callable[[Results], Figure]] = {}
    deep = stats.deepest(results)
    if deep is not None:
        made |= {"accuracy": accuracy, "paths": paths, "forgetting": partial(forgetting, phase=deep)}
        if _seeds(results, deep):
            made["gradients"] = partial(gradients, phase=deep)
    if stats.select(results, "sweep"):
        made["sweep"] = sweep
    if stats.select(results, "failure"):
        made["failure"] = failure
    return {f"reproduction_{name}": make for name, make in made.items()}


def paths(results: Results) -> Figure:
    """How much of the class the path tells: a dot a seed, by phase, all on one scale."""
    figure = _panels(results, routing.information)
    figure.supxlabel(
        f"how much an image's path tells of its class: 0 no more than by chance, 1 every class has paths of its own\n{DOTS}",
        fontsize=9,
    )
    return figure


def accuracy(results: Results) -> Figure:
    """A dot a seed, by phase, all on one scale."""
    figure = _panels(results, stats.accuracy)
    figure.supxlabel(f"test accuracy, %\n{DOTS}", fontsize=9)
    return figure


def gradients(results: Results, phase: str) -> Figure:
    figure = single.gradients(_view(results, phase, _seeds(results, phase)[:1]))
    updates = results["protocol"]["settings"]["novel"] * len(results["data"][phase]["classes"])
    figure.suptitle(f"{phase}: gradient norm per expert, mean over {updates} one-shot updates")
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
        f"Difference from {center} as it is: mean and 95 % interval (filled: without 0; arrows: beyond the axis)", fontsize=11
    )
    return figure


def failure(results: Results) -> Figure:
    """Who trains: a mark a seed, and where those that train end."""
    of_stage = results["protocol"]["failure"]
    columns, arms = list(conditions(results)), list(of_stage["arms"])
    figure, axes = plt.subplots(figsize=(1.8 + 1.7 * len(columns), 1.0 + 0.44 * len(arms)), layout="constrained")
    for column, condition in enumerate(columns):
        for row, name in enumerate(arms):
            runs = stats.select(results, "failure", arm=f"{name}, {condition}")
            shade = color(of_stage["arms"][name]["routers"][0])
            for place, run in zip(_spread(len(runs)), sorted(runs, key=lambda one: _rank(results, one)), strict=True):
                lost = stats.has_failed(results, run)
                marker = "x" if lost and stats.is_collapsed(results, run) else "o"
                face = "none" if lost else shade
                axes.plot(
                    column + place, row - 0.1, marker, markersize=8, color=shade, markerfacecolor=face, markeredgewidth=1.5
                )
            kept = [run["accuracy"] for run in stats.trained(results, runs)]
            told = "all fail" if not kept else f"{span(kept, '.0f')} %"
            axes.text(column, row + 0.34, told, ha="center", va="center", fontsize=8, color=NEUTRAL if kept else "#999999")
    for line in range(1, len(columns)):
        axes.axvline(line - 0.5, color="#DDDDDD", linewidth=1)
    axes.set_xticks(range(len(columns)), [name.replace(", ", ",\n") for name in columns], fontsize=9)
    axes.set_yticks(range(len(arms)), arms, fontsize=9)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "A mark is a network. Filled: it trains, and ends at this test accuracy; hollow: it fails, that is, stays below "
        f"{results['protocol']['failed']['accuracy_below']:g} %\n({phase_title(results, of_stage['phase'])}); "
        "cross: it fails, and all images take one path",
        fontsize=9,
    )
    return figure


def _panels(results: Results, quantity: Quantity) -> Figure:
    """A panel a phase on one scale: a dot a seed, the mean and its 95 % interval; failed seeds are hollow."""
    phases = [phase for phase in results["protocol"]["main"]["phases"] if stats.select(results, "main", phase)]
    columns = min(len(phases), 2)
    rows = -(-len(phases) // columns)
    tall = [
        max(len(routers_of(results, phase)) for phase in phases[row * columns : (row + 1) * columns]) for row in range(rows)
    ]
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 0.5 + sum(0.4 + 0.36 * count for count in tall)), layout="constrained",
        squeeze=False, sharex=True, height_ratios=tall,
    )  # fmt: skip
    for axes, phase in zip(grid.flat, phases, strict=False):
        _dots(axes, results, phase, quantity)
        axes.set_title(phase_title(results, phase), fontsize=9)
        axes.tick_params(axis="x", labelbottom=True, labelsize=8)
    for axes in grid.flat[len(phases) :]:
        axes.set_axis_off()
    return figure


def _dots(axes: Axes, results: Results, phase: str, quantity: Quantity) -> None:
    routers = routers_of(results, phase)
    for place, router in enumerate(reversed(routers)):
        records = stats.select(results, "main", phase, router)
        kept = list(stats.known(stats.trained(results, records), quantity).values())
        lost = list(stats.known([one for one in records if stats.has_failed(results, one)], quantity).values())
        for values, face in ((kept, color(router)), (lost, "none")):
            axes.scatter(values, place + 0.16 + lanes(values), s=14, facecolors=face, edgecolors=color(router), alpha=0.6)
        if kept:
            summary = interval(list(kept))
            axes.errorbar(summary["mean"], place - 0.22, xerr=summary["ci95"] or 0, fmt="D", color=color(router), markersize=5,
                          capsize=2)  # fmt: skip
    axes.set_yticks(range(len(routers)), [plain(name) for name in reversed(routers)], fontsize=8)
    axes.set_ylim(-0.6, len(routers) - 0.4)
    axes.grid(axis="x", alpha=0.3)


def _rank(results: Results, run: Record) -> tuple[bool, bool, float]:
    """The best first, and those on one path last."""
    return stats.has_failed(results, run), stats.is_collapsed(results, run), -(run["accuracy"] or 0.0)


def _spread(count: int) -> Any:
    return 0.17 * (np.arange(count) - (count - 1) / 2)


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


def _reach(differences: list[Difference]) -> float:
    """Half the width of an axis on which all but the very wide intervals have room."""
    ends = [abs(found.mean) + (found.half or 0.0) for found in differences]
    usual = float(np.median(ends)) if ends else 1.0
    return 1.1 * max([end for end in ends if end <= WIDEST * usual], default=1.0) or 1.0


def _difference(axes: Axes, place: int, found: Difference | None, reach: float) -> None:
    if found is None:
        axes.text(0, place, "not reached", ha="center", va="center", fontsize=7)
        return
    face = NEUTRAL if stats.side(found) else "white"
    if abs(found.mean) >= reach:  # beyond the axis: its numbers, at the edge where it lies
        sign = 1 if found.mean > 0 else -1
        axes.plot(0.97 * sign * reach, place, ">" if sign > 0 else "<", color=NEUTRAL)
        told = f"{found.mean:+.1f}" + ("" if found.half is None else f" ± {found.half:.1f}")
        axes.text(0.92 * sign * reach, place, told, ha="right" if sign > 0 else "left", va="center", fontsize=7)
        return
    axes.errorbar(
        found.mean, place, xerr=found.half or 0, fmt="o", color=NEUTRAL, markerfacecolor=face, markersize=5, capsize=2
    )
    for sign, marker in ((-1, "<"), (1, ">")):  # an interval that goes on beyond the axis
        if sign * found.mean + (found.half or 0.0) > reach:
            axes.plot(0.985 * sign * reach, place, marker, color=NEUTRAL, markersize=5)
