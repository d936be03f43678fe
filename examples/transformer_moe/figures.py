"""Pictures of what the routers do. Each shows what results.json says."""

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

from examples.shared.figures import save
from examples.shared.palette import color

from .summary import adaptation

Results = dict[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure into `folder`; return the files."""
    figures: dict[str, Callable[[Results], Figure]] = {"loss": loss, "load": load, "gates": gates}
    if len(results["data"]["domains"]) > 1:
        figures["domains"] = domains
    if results["adapt_domain"]:
        figures["adaptation"] = adapted
    return save(figures, results, folder)


def loss(results: Results) -> Figure:
    """Validation loss over steps, whole and from the middle on as a difference to the first arm; a thin line a seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    runs = results["runs"]
    reference = "none" if "none" in runs else next(iter(runs))
    base = _series(runs[reference], "loss")
    for arm, of_arm in runs.items():
        steps, values = _steps(of_arm), _series(of_arm, "loss")
        _lines(left, steps, values, arm)
        if arm != reference:
            half = len(steps) // 2
            _lines(right, steps[half:], (values - base)[:, half:], arm)
    entropy = results["data"]["pooled_entropy"]
    left.axhline(entropy, color="gray", linestyle="--", linewidth=1)
    left.annotate(
        "unigram entropy", (0.98, entropy), (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8
    )
    left.set(xlabel="step", ylabel="validation loss, nats/byte")
    left.legend(fontsize=8)
    right.axhline(0, color="gray", linewidth=1)
    right.set(xlabel="step", ylabel=f"difference to {reference}, nats/byte")
    return figure


def load(results: Results) -> Figure:
    """Share of the assignments that each expert of each layer gets, over steps, seed 0; 1 is an even share."""
    runs, experts = results["runs"], _experts(results)
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.6 * columns + 1, 3.1 * rows + 0.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes in grid.flat[len(runs) :]:
        axes.axis("off")
    for axes, (arm, (first, *_)) in zip(grid.flat, runs.items(), strict=False):
        history = first["train"]["history"]
        values = np.array([row["load"] for row in history], dtype=float) * experts  # (steps, layers, experts)
        layers = values.shape[1]
        picture = axes.imshow(
            values.reshape(len(values), -1).T, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2
        )
        for layer in range(1, layers):
            axes.axhline(layer * experts - 0.5, color="black", linewidth=1)
        marks = sorted({0, len(history) // 2, len(history) - 1})
        axes.set_xticks(marks, [str(history[mark]["step"]) for mark in marks])
        axes.set_yticks([(layer + 0.5) * experts - 0.5 for layer in range(layers)], [str(layer + 1) for layer in range(layers)])
        axes.set_title(f"{arm}, seed {first['seed']}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer (a row an expert)", fontsize=8)
    figure.colorbar(picture, ax=grid, label="load / even load (2: twice or more)", shrink=0.8)
    return figure


def gates(results: Results) -> Figure:
    """Stable rank and spectral norm of the gates, load CV and changes of the top-1 expert over steps; means over layers."""
    shown = (
        ("stable_rank", f"stable rank of the gates (at most {_experts(results)})"),
        ("spectral_norm", "spectral norm of the gates"),
        ("load_cv", "load CV"),
        ("fluctuation", "share of tokens whose top-1 expert changed"),
    )
    figure, grid = plt.subplots(2, 2, figsize=(9.5, 6), layout="constrained")
    for axes, (name, label) in zip(grid.flat, shown, strict=True):
        skip = 1 if name == "fluctuation" else 0
        for arm, of_arm in results["runs"].items():
            values = [[np.array(row[name], dtype=float).mean() for row in run["train"]["history"][skip:]] for run in of_arm]
            _lines(axes, _steps(of_arm)[skip:], np.array(values, dtype=float), arm)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    grid[1, 1].legend(fontsize=8)
    return figure


def domains(results: Results) -> Figure:
    """Share of each domain's tokens whose heaviest expert it is, at the end of training, seed 0."""
    runs, names, experts = results["runs"], results["data"]["domains"], _experts(results)
    first = next(iter(runs.values()))[0]["train"]["history"][-1]["domain_shares"]
    figure, grid = plt.subplots(
        len(runs), len(first), figsize=(2.1 * len(first) + 1.6, 0.17 * len(names) * len(runs) + 0.5 * len(runs) + 0.6),
        layout="constrained", squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for row, (arm, (run, *_)) in zip(grid, runs.items(), strict=True):
        last = run["train"]["history"][-1]
        for layer, (axes, shares) in enumerate(zip(row, last["domain_shares"], strict=True)):
            picture = axes.imshow(np.array(shares) * experts, aspect="auto", cmap="viridis", vmin=0, vmax=experts / 2)
            axes.set_yticks(range(len(names)), names, fontsize=7)
            axes.set_xticks([])
            axes.set_title(f"{arm}, layer {layer + 1}: {last['specialisation'][layer]:.2f}", fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("expert", fontsize=8)
    figure.colorbar(picture, ax=grid, label="share of the domain's tokens / even share", shrink=0.6)
    return figure


def adapted(results: Results) -> Figure:
    """What the adapted domain gains against what the others lose; a dot a measurement, a thin line a seed."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, runs in results["runs"].items():
        curves = np.array([adaptation(run["adapt"], results["adapt_domain"]) for run in runs], dtype=float)
        if len(curves) > 1:
            axes.plot(curves[:, 0].T, curves[:, 1].T, color=color(arm), linewidth=0.6, alpha=0.4)
        axes.plot(*curves.mean(0), color=color(arm), marker=".", linewidth=1.8, label=arm)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(xlabel=f"gain on {results['adapt_domain']}, nats/byte", ylabel="loss given up on the other domains, nats/byte")
    axes.set_title(f"{results['config']['adapt_steps']} steps on {results['adapt_domain']} alone", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _steps(runs: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in runs[0]["train"]["history"]]


def _series(runs: list[dict[str, Any]], name: str) -> Any:
    return np.array([[row[name] for row in run["train"]["history"]] for run in runs], dtype=float)


def _lines(axes: Axes, steps: list[int], values: Any, arm: str) -> None:
    """values (seeds, steps): a thin line each, and their mean."""
    if len(values) > 1:
        axes.plot(steps, values.T, color=color(arm), linewidth=0.6, alpha=0.4)
    axes.plot(steps, values.mean(0), color=color(arm), linewidth=1.8, marker=".", markersize=4, label=arm)


def _experts(results: Results) -> int:
    return len(next(iter(results["runs"].values()))[0]["train"]["history"][-1]["load"][0])
