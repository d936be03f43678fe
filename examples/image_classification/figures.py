"""Pictures in the manner of the paper's figures 2 to 4 and 6, and the training curves. Each shows what results.json says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from examples.shared.figures import plain, save
from examples.shared.palette import CLASSES, color

PATHS_SHOWN = 12
SEEDS_SHOWN = 3
Results = dict[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; return the files."""
    figures: dict[str, Callable[[Results], Figure]] = {
        "experts": experts,
        "paths": paths,
        "gradients": gradients,
        "oneshot": oneshot,
        "training": training,
    }
    return save(figures, results, folder)


def experts(results: Results) -> Figure:
    """Figures 2 to 4, per expert: the share of the test images, by class, for which each expert wins."""
    layers, each = results["config"]["layers"], results["config"]["experts"]
    figure, grid = _grid(results, width=1 + 0.32 * layers * (each + 0.8), height=2.4)
    places = np.concatenate([np.arange(each) + layer * (each + 0.8) for layer in range(layers)])
    for axes, router, run in grid:
        share = np.array(run["routing"]["expert_share"]).reshape(layers * each, -1)
        _stack(axes, places, share / share.shape[-1], results["data"]["classes"])
        axes.set_xticks(places, [f"E{expert + 1}" for _ in range(layers) for expert in range(each)], fontsize=7)
        for layer in range(layers):
            middle = layer * (each + 0.8) + (each - 1) / 2
            axes.annotate(f"layer {layer + 1}", (middle, 0), (0, -22), textcoords="offset points", ha="center", fontsize=8)
        axes.set_title(f"{router}, seed {run['seed']}", fontsize=9)
    _class_legend(figure, grid[0][0])
    figure.suptitle("Winning expert of each layer, by class (share of the test images)")
    return figure


def paths(results: Results) -> Figure:
    """Figures 2 to 4, per path: the share of the test images, by class, that take each path."""
    figure, grid = _grid(results, width=4.2, height=2.4)
    for axes, router, run in grid:
        counts = sorted(run["routing"]["path_counts"].items(), key=lambda item: -sum(item[1]))
        names = [name for name, _ in counts[:PATHS_SHOWN]]
        table = np.array([count for _, count in counts], dtype=float)
        if len(counts) > PATHS_SHOWN:
            names.append(f"{len(counts) - PATHS_SHOWN} more")
            table = np.vstack([table[:PATHS_SHOWN], table[PATHS_SHOWN:].sum(0)])
        _stack(axes, np.arange(len(table)), table / table.sum(), results["data"]["classes"])
        axes.set_xticks(np.arange(len(names)), names, rotation=60 if len(names) > 4 else 0, fontsize=7)
        axes.set_xlim(-0.6, max(len(names), 4) - 0.4)
        axes.set_title(f"{router}, seed {run['seed']}: {len(counts)} paths", fontsize=9)
    _class_legend(figure, grid[0][0])
    figure.suptitle("Path through the layers, by class (share of the test images)")
    return figure


def gradients(results: Results) -> Figure:
    """Figure 6: norm of the gradient of equation 7 for each expert at a one-shot update; mean over the novel images."""
    layers, each = results["config"]["layers"], results["config"]["experts"]
    figure, grid = _grid(results, width=1.2 + 0.75 * each, height=0.9 + 0.5 * layers)
    norms = [np.array(run["oneshot"]["gradient_norm"], dtype=float) for _, _, run in grid]
    positive = np.concatenate([norm[np.isfinite(norm) & (norm > 0)] for norm in norms])
    top = positive.max(initial=1e-12)
    # below a millionth of the largest all shades are one: such an expert does not learn
    bottom = max(positive.min(initial=top), 1e-6 * top) * 0.999
    scale = LogNorm(bottom, top)
    for (axes, router, run), norm in zip(grid, norms, strict=True):
        image = axes.imshow(np.maximum(norm, bottom), norm=scale, cmap="viridis", aspect="auto")
        for (layer, expert), value in np.ndenumerate(norm):
            dark = np.isfinite(value) and scale(max(value, bottom)) < 0.6
            axes.text(expert, layer, f"{value:.2g}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(each), [f"E{expert + 1}" for expert in range(each)], fontsize=8)
        axes.set_yticks(range(layers), [f"layer {layer + 1}" for layer in range(layers)], fontsize=8)
        axes.set_title(f"{router}, seed {run['seed']}", fontsize=9)
    figure.colorbar(image, ax=[axes for axes, _, _ in grid], label="gradient norm (log scale)")
    figure.suptitle("Gradient norm per expert at a one-shot update")
    return figure


def oneshot(results: Results) -> Figure:
    """The delta rows of tables 1 and 2 with their intervals, and the accuracy before the update."""
    names = [*results["data"]["classes"], "mean"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1, max(2, len(names) / 2)]
    )
    width = 0.8 / len(results["summary"])
    for index, (router, summary) in enumerate(results["summary"].items()):
        entries = [summary[f"delta/{name}"] for name in names[:-1]] + [summary["mean_delta"]]
        places = np.arange(len(names)) + (index - (len(results["summary"]) - 1) / 2) * width
        _bars(right, places, entries, width, router)
        _bars(left, np.array([index]), [summary["accuracy"]], 0.7, router)
    left.set_xticks(range(len(results["summary"])), list(results["summary"]), rotation=20, fontsize=8)
    left.set(title="before the update", ylabel="test accuracy, %", ylim=(0, 100))
    right.set_xticks(range(len(names)), [plain(name) for name in names])
    right.axhline(0, color="black", linewidth=0.8)
    right.set(title="after one update on a novel image of ...", ylabel="change of test accuracy, points")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"One-shot test, scope {results['config']['scope']} (bars: 95 % interval over seeds)")
    return figure


def training(results: Results) -> Figure:
    """Curves over epochs: accuracy, task loss, stable rank and spectral norm (mean over layers); a thin line a seed."""
    curves: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("validation accuracy, %", lambda row: row["val_accuracy"]),
        ("task loss (training)", lambda row: row["task"]),
        ("stable rank, mean over layers", lambda row: _mean(row["stable_rank"])),
        ("spectral norm, mean over layers", lambda row: _mean(row["spectral_norm"])),
    ]
    figure, grid = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.2), layout="constrained")
    for axes, (label, read) in zip(grid, curves, strict=True):
        for router, runs in results["runs"].items():
            lines = np.array([[read(row) for row in run["history"]] for run in runs], dtype=float)
            epochs = np.arange(1, lines.shape[1] + 1)
            axes.plot(epochs, lines.T, color=color(router), linewidth=0.7, alpha=0.5)
            axes.plot(epochs, lines.mean(0), color=color(router), linewidth=2, label=router)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("epoch")
    grid[0].legend(fontsize=8)
    return figure


def _grid(results: Results, width: float, height: float) -> tuple[Figure, list[tuple[Axes, str, dict[str, Any]]]]:
    """A column a router, a row a seed: experts are numbered anew by each seed, so a mean over seeds would blur them."""
    runs = results["runs"]
    rows = min(len(results["seeds"]), SEEDS_SHOWN)
    size = (max(width, 2.6) * len(runs) + 1.2, height * rows + 0.8)
    figure, grid = plt.subplots(rows, len(runs), figsize=size, layout="constrained", sharey=True, squeeze=False)
    return figure, [(grid[row, column], router, runs[router][row]) for column, router in enumerate(runs) for row in range(rows)]


def _class_legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), title="class", loc="outside right upper", fontsize=8)


def _mean(values: list[float | None]) -> float:
    return float(np.mean(np.array(values, dtype=float)))  # null, of a diverged run, becomes NaN


def _stack(axes: Axes, places: Any, table: Any, classes: list[str]) -> None:
    """Bars stacked by class; table (bars, classes)."""
    bottom = np.zeros(len(table))
    for label, name in enumerate(classes):
        shade = CLASSES[label] if len(classes) <= len(CLASSES) else plt.get_cmap("turbo")(label / (len(classes) - 1))
        axes.bar(places, table[:, label], 0.8, bottom=bottom, color=shade, label=plain(name))
        bottom += table[:, label]


def _bars(axes: Axes, places: Any, entries: list[dict[str, Any]], width: float, label: str) -> None:
    errors = None if entries[0]["ci95"] is None else [entry["ci95"] for entry in entries]
    axes.bar(places, [entry["mean"] for entry in entries], width, yerr=errors, capsize=2, label=label, color=color(label))
