"""Pictures of what the experts do. Each shows what results.json says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.shared.figures import plain, save
from examples.shared.palette import CLASSES, color

SEEDS_SHOWN = 3
LEAST_FOR_TSNE = 10
Results = dict[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; return the files. Without an arm that has experts there is only `training`."""
    figures: dict[str, Callable[[Results], Figure]] = {"training": training}
    if mixtures(results):
        figures |= {"class_weights": class_weights, "fixed_expert": fixed_expert, "gate_scores": gate_scores, "load": load}
    return save(figures, results, folder)


def mixtures(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm that has experts."""
    return {arm: runs for arm, runs in results["runs"].items() if "routing" in runs[0]}


def class_weights(results: Results) -> Figure:
    """Mean weight that the gate gives each expert on the test images of each class."""
    classes, experts = results["data"]["classes"], results["config"]["experts"]
    few = len(classes) * experts <= 100
    figure, grid = _grid(results, width=1.2 + 0.4 * experts, height=0.8 + 0.24 * min(len(classes), 40))
    for axes, arm, run in grid:
        table = np.array(run["routing"]["class_weights"], dtype=float)
        image = axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_xticks(range(experts), [f"E{expert + 1}" for expert in range(experts)], fontsize=7)
        if few:
            axes.set_yticks(range(len(classes)), [plain(name) for name in classes], fontsize=7)
        axes.set_title(f"{arm}, seed {run['seed']}", fontsize=9)
    figure.colorbar(image, ax=[axes for axes, _, _ in grid], label="mean weight")
    figure.suptitle("Mean weight of each expert, by class (test images)")
    return figure


def fixed_expert(results: Results) -> Figure:
    """Test accuracy with all the weight on one expert (dots), their mean (bar), and that of the whole network (line)."""
    runs = mixtures(results)
    seeds = len(results["seeds"])
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(runs), 3.8), layout="constrained")
    for index, (arm, of_arm) in enumerate(runs.items()):
        for seed, run in enumerate(of_arm):
            place = index + 0.7 * ((seed + 0.5) / seeds - 0.5)
            fixed, width = run["fixed_expert"], 0.6 / seeds
            axes.bar(place, fixed["mean"], width, color=color(arm), alpha=0.35)
            axes.scatter([place] * len(fixed["each"]), fixed["each"], s=14, color=color(arm), zorder=3)
            axes.plot([place - width / 2, place + width / 2], [run["accuracy"]] * 2, color="black", linewidth=1.5)
    axes.axhline(100 / len(results["data"]["classes"]), color="gray", linestyle=":", linewidth=1)
    axes.annotate("chance", (1, 100 / len(results["data"]["classes"])), (-2, 2), ("axes fraction", "data"), "offset points",
                  ha="right", fontsize=7, color="gray")  # fmt: skip
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set(ylim=(0, 101), ylabel="test accuracy, %")
    axes.set_title("One fixed expert: each (dots), their mean (bars); black: the whole network; one bar a seed", fontsize=9)
    return figure


def gate_scores(results: Results) -> Figure:
    """t-SNE of the gate's scores on test images of seed 0, coloured by class and by the expert of the largest weight."""
    runs = mixtures(results)
    classes, experts = results["data"]["classes"], results["config"]["experts"]
    figure, grid = plt.subplots(2, len(runs), figsize=(2.7 * len(runs) + 1.4, 5.4), layout="constrained", squeeze=False)
    for column, (arm, (first, *_)) in enumerate(runs.items()):
        gate = first["gate"]
        points = embed(np.array(gate["scores"], dtype=float))
        rows = (("labels", [plain(name) for name in classes]), ("winners", [f"E{expert + 1}" for expert in range(experts)]))
        for row, (key, names) in enumerate(rows):
            axes = grid[row, column]
            for number, name in enumerate(names):
                mine = points[np.array(gate[key]) == number]
                axes.scatter(mine[:, 0], mine[:, 1], s=4, color=_color(number, len(names)), label=name)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{arm}, by {'class' if row == 0 else 'expert'}", fontsize=9)
    for row, title in enumerate(("class", "expert")):
        if row or len(classes) <= 20:
            grid[row, -1].legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, markerscale=2.5)
    figure.suptitle("t-SNE of the gate's scores, seed 0 (test images)")
    return figure


def embed(scores: Any) -> Any:
    """(n, K) -> (n, 2) by t-SNE; as many zeros where the images are too few, or a run diverged."""
    if len(scores) < LEAST_FOR_TSNE or not np.isfinite(scores).all():
        return np.zeros((len(scores), 2))
    from sklearn.manifold import TSNE

    return TSNE(perplexity=min(30, len(scores) / 4), init="random", random_state=0).fit_transform(scores)


def load(results: Results) -> Figure:
    """Share of the training images that are sent to each expert, over epochs; dashed: an even load."""
    config = results["config"]
    figure, grid = _grid(results, width=2.6, height=2.0)
    for axes, arm, run in grid:
        lines = np.array([row["load"] for row in run["history"]], dtype=float)
        for expert, line in enumerate(lines.T):
            axes.plot(np.arange(1, len(line) + 1), line, marker=".", markersize=4, color=_color(expert, lines.shape[1]))
        axes.axhline(config["top_k"] / config["experts"], color="gray", linestyle="--", linewidth=1)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{arm}, seed {run['seed']}", fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
    figure.suptitle("Share of the training images sent to each expert (a line an expert)")
    return figure


def training(results: Results) -> Figure:
    """Validation accuracy and loss over epochs; a thin line a seed."""
    figure, grid = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axes, (name, label) in zip(
        grid, (("val_accuracy", "validation accuracy, %"), ("task", "task loss (training)")), strict=True
    ):
        for arm, runs in results["runs"].items():
            lines = np.array([[row[name] for row in run["history"]] for run in runs], dtype=float)
            epochs = np.arange(1, lines.shape[1] + 1)
            axes.plot(epochs, lines.T, color=color(arm), linewidth=0.7, alpha=0.5)
            axes.plot(epochs, lines.mean(0), color=color(arm), linewidth=2, label=arm)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("epoch")
    grid[1].set_yscale("log")
    grid[0].legend(fontsize=8)
    return figure


def _grid(results: Results, width: float, height: float) -> tuple[Figure, list[tuple[Axes, str, dict[str, Any]]]]:
    """A column an arm, a row a seed: experts are numbered anew by each seed, so a mean over seeds would blur them."""
    runs = mixtures(results)
    rows = min(len(results["seeds"]), SEEDS_SHOWN)
    size = (max(width, 2.2) * len(runs) + 1.2, height * rows + 0.8)
    figure, grid = plt.subplots(rows, len(runs), figsize=size, layout="constrained", sharey=True, squeeze=False)
    return figure, [(grid[row, column], arm, runs[arm][row]) for column, arm in enumerate(runs) for row in range(rows)]


def _color(number: int, of: int) -> Any:
    return CLASSES[number] if of <= len(CLASSES) else plt.get_cmap("turbo")(number / (of - 1))
