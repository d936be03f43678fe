"""Pictures of a study. Each shows what results.json says: means, 95 % intervals over seeds, a dot a seed."""

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
from examples.shared.runs import interval

from .arms import BASE

Results = dict[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure of the study into `folder`; return the files."""
    of_study: dict[str, dict[str, Callable[[Results], Figure]]] = {
        "norm": {"noise": noise, "gap": gap, "sigma": sigma, "coefficients": coefficients},
        "energy": {"error": error, "energy": energy, "coefficients": coefficients},
    }
    return save(of_study[results["config"]["study"]], results, folder)


def noise(results: Results) -> Figure:
    """Test accuracy against noise on the input, the same as paired differences, and the norm of the loss's input gradient."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[1.3, 1.3, 1])
    levels = [0.0, *results["config"]["noise"]]
    curves = {
        arm: _array([[run["test_accuracy"], *run["noise_accuracy"]] for run in runs]) for arm, runs in results["runs"].items()
    }
    for arm, of_arm in curves.items():
        _band(left, levels, of_arm, arm)
        _band(middle, levels, of_arm - curves[BASE], arm)
    left.set_title("test accuracy, %", fontsize=10)
    middle.set_title(f"less that of {BASE} with the same seed, points", fontsize=10)
    for axes in (left, middle):
        axes.set_xlabel("standard deviation of the noise (pixels in [-1, 1])")
    left.legend(fontsize=8)
    _dots(right, results, "gradient_norm")
    right.set_title("norm of the loss's gradient by the image", fontsize=10)
    right.set_ylim(bottom=0)
    figure.suptitle("Sensitivity to the input (test images)")
    return figure


def gap(results: Results) -> Figure:
    """The gap between training and test, in accuracy and in loss, beside the test accuracy that it comes with."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, name, label in zip(
        grid,
        ("gap_accuracy", "gap_loss", "test_accuracy"),
        ("training - test accuracy, points", "test - training loss", "test accuracy, %"),
        strict=True,
    ):
        _dots(axes, results, name)
        axes.set_title(label, fontsize=10)
    for axes in grid[:2]:
        axes.set_ylim(bottom=0)
    figure.suptitle("The gap between training and test")
    return figure


def sigma(results: Results) -> Figure:
    """Spectral norm of each layer at the end."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    names = _layers(results)
    width = 0.8 / len(results["runs"])
    for index, (arm, runs) in enumerate(results["runs"].items()):
        mean, half = _intervals(_array([run["sigma"] for run in runs]))
        places = np.arange(len(names)) + (index - (len(results["runs"]) - 1) / 2) * width
        axes.bar(places, mean, width, yerr=half, capsize=2, color=color(arm), label=arm)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0)
    axes.set(ylabel="spectral norm", title="Spectral norm of each layer after training")
    axes.legend(fontsize=8)
    return figure


def error(results: Results) -> Figure:
    """Test error of each arm, a thin line for each seed, and the paired difference from none."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    arms, runs = list(results["runs"]), results["runs"]
    errors = 100 - _array([[run["test_accuracy"] for run in runs[arm]] for arm in arms])
    base = errors[arms.index(BASE)]
    left.plot(range(len(arms)), errors, color="grey", linewidth=0.6, alpha=0.7)
    _points(left, arms, errors)
    left.set(title="test error, %; grey: one seed")
    _points(right, arms, errors - base)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(title=f"test error less that of {BASE} with the same seed, points")
    return figure


def energy(results: Results) -> Figure:
    """Half-space energy over epochs, layer by layer."""
    names = _layers(results)
    figure, grid = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), layout="constrained", squeeze=False)
    for place, (axes, name) in enumerate(zip(grid[0], names, strict=True)):
        kind = "energy" if name == "head" else "half_energy"
        for arm, runs in results["runs"].items():
            curves = _array([[row[kind][place] for row in run["history"]] for run in runs])
            _band(axes, range(1, curves.shape[1] + 1), curves, arm)
        axes.set_title(f"{name}, {'full' if name == 'head' else 'half'} space", fontsize=10)
        axes.set_xlabel("epoch")
    grid[0][0].set_ylabel("energy of the rows' directions, s = 2")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def coefficients(results: Results) -> Figure:
    """The grid that coefficients were chosen from; a ring marks the chosen one."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for arm, points in results["tuning"].items():
        multiples, scores = [point["multiple"] for point in points], [point["val_accuracy"] for point in points]
        if multiples == [0.0]:
            axes.axhline(scores[0], color=color(arm), label=arm, linestyle="--")
            continue
        axes.plot(multiples, scores, color=color(arm), marker="o", markersize=4, label=arm)
        chosen = results["chosen"][arm]["multiple"]
        axes.plot(chosen, scores[multiples.index(chosen)], "o", color=color(arm), markersize=11, fillstyle="none")
    axes.set_xscale("log")
    axes.set(
        xlabel="multiple of the published coefficient", ylabel="mean validation accuracy, %", title="Choice of coefficients"
    )
    axes.legend(fontsize=8)
    return figure


def _layers(results: Results) -> list[str]:
    return [f"conv{index}" for index in range(1, len(results["config"]["widths"]) + 1)] + ["head"]


def _array(values: list[list[Any]]) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=float)  # null, of a diverged run, becomes NaN


def _intervals(samples: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(seeds, n) -> means and half-widths (n,); a single seed has half-width 0 here."""
    entries = [interval(column.tolist()) for column in samples.T]
    return _array([[entry["mean"] for entry in entries]])[0], _array([[entry["ci95"] or 0.0 for entry in entries]])[0]


def _band(axes: Axes, places: Any, curves: np.ndarray[Any, Any], label: str) -> None:
    mean, half = _intervals(curves)
    axes.plot(places, mean, color=color(label), label=label, linewidth=1.6)
    axes.fill_between(places, mean - half, mean + half, color=color(label), alpha=0.15, linewidth=0)


def _dots(axes: Axes, results: Results, name: str) -> None:
    _points(axes, list(results["runs"]), _array([[run[name] for run in runs] for runs in results["runs"].values()]))


def _points(axes: Axes, arms: list[str], samples: np.ndarray[Any, Any]) -> None:
    """samples (arms, seeds): a dot a seed, beside the mean with its interval."""
    mean, half = _intervals(samples.T)
    for index, arm in enumerate(arms):
        axes.plot(np.full(samples.shape[1], index - 0.12), samples[index], "o", color=color(arm), markersize=4, alpha=0.5)
        axes.errorbar(index + 0.12, mean[index], half[index], fmt="s", color=color(arm), capsize=4, markersize=6)
    axes.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(arms) - 0.5)
