"""The verdicts and the tables behind them, as text and as Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.image_classification.report import Rows, markdown
from examples.shared.storage import write_text

from .arms import BASE

Results = dict[str, Any]
NAMES = {
    "train_accuracy": "Training accuracy, %",
    "train_loss": "Training loss",
    "test_accuracy": "Test accuracy, %",
    "test_loss": "Test loss",
    "gap_accuracy": "Gap: training - test accuracy, points",
    "gap_loss": "Gap: test - training loss",
    "mean_noise_accuracy": "Test accuracy under noise, mean over levels, %",
    "gradient_norm": "Norm of the input's gradient, test images",
    "mean_sigma": "Spectral norm, mean over layers",
    "mean_energy": "Energy, mean over layers",
    "mean_half_energy": "Half-space energy, mean over layers",
}
FORMS = {name: ".2f" if "accuracy" in name else ".4f" if "loss" in name else ".3f" for name in NAMES}


def write(results: Results, out: Path) -> None:
    """Print the first tables and write all of them to tables.md."""
    tables = [
        ("Claims", *claims(results)),
        ("Results", *metrics(results["summary"])),
        ("Coefficients: mean validation accuracy over the tuning seeds, %", *grid(results)),
        *((f"Paired differences from {arm}", *metrics(results["differences"][arm], "+")) for arm in results["differences"]),
        ("Layers, means over the seeds", *layers(results)),
    ]
    console = Console()
    for heading, columns, rows in tables[:3]:
        table = Table("", *columns, title=escape(heading), title_justify="left")
        for label, cells in rows:
            table.add_row(escape(label), *map(escape, cells))
        console.print(table)
    text = "\n".join(f"### {heading}\n\n{markdown(rows, columns)}" for heading, columns, rows in tables)
    text += f"\n{footnote(results)}\n"
    console.print(footnote(results), soft_wrap=True, highlight=False, markup=False)
    write_text(out / "tables.md", text)


def claims(results: Results) -> tuple[list[str], Rows]:
    rows: Rows = []
    for claim in results["claims"]:
        label = f"{NAMES[claim['metric']]}: {claim['arm']} {claim['direction']} than {claim['against']}"
        form = FORMS[claim["metric"]]
        tests = [_probability(claim["t_test_p"]), _probability(claim["sign_test_p"])]
        rows.append((label, [_spread(claim, "+" + form), *tests, claim["verdict"]]))
    return ["difference", "p (t)", "p (sign)", "verdict"], rows


def metrics(columns: dict[str, Any], sign: str = "") -> tuple[list[str], Rows]:
    rows = [
        (label, [_spread(of_arm[name], sign + FORMS[name]) for of_arm in columns.values()]) for name, label in NAMES.items()
    ]
    return list(columns), rows


def layers(results: Results) -> tuple[list[str], Rows]:
    """Means over the seeds, layer by layer and noise level by noise level."""
    runs = results["runs"]
    rows: Rows = []
    config = results["config"]
    names = [f"conv{index}" for index in range(1, len(config["widths"]) + 1)] + ["head"]
    parts = [
        ("Test accuracy under noise {}, %", "noise_accuracy", [f"{level:g}" for level in config["noise"]], ".2f"),
        ("Spectral norm, {}", "sigma", names, ".3f"),
        ("Energy, {}", "energy", names, ".3f"),
        ("Half-space energy, {}", "half_energy", names, ".3f"),
    ]
    for label, name, places, form in parts:
        for index, place in enumerate(places):
            values = [[run[name][index] for run in of_arm] for of_arm in runs.values()]
            means = [None if None in of_arm else sum(of_arm) / len(of_arm) for of_arm in values]
            rows.append((label.format(place), [_number(mean, form) for mean in means]))
    return list(runs), rows


def grid(results: Results) -> tuple[list[str], Rows]:
    """The whole grid; the chosen multiple of the published coefficient, and the coefficient itself."""
    multiples = results["config"]["multiples"]
    rows: Rows = []
    for arm, points in results["tuning"].items():
        chosen = results["chosen"][arm]
        if arm == BASE:
            rows.append((arm, [f"{points[0]['val_accuracy']:.2f}"] + [""] * len(multiples)))
            continue
        ends = (min(multiples), max(multiples)) if len(multiples) > 1 else ()
        end = ", an end of the grid" if chosen["multiple"] in ends else ""
        cells = [f"{point['val_accuracy']:.2f}" for point in points]
        rows.append((arm, [*cells, f"x {chosen['multiple']:g} = {chosen['coefficient']:g}{end}"]))
    return [*(f"x {multiple:g}" for multiple in multiples), "chosen"], rows


def footnote(results: Results) -> str:
    seeds, images = results["config"]["seeds"], results["data"]["images"]
    text = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t). Differences are paired by seed. Shown: the "
        "interval lies on the claimed side of 0; refuted: on the other; not shown: it holds 0. "
        f"With {seeds} seeds p (sign) is at least {2.0 ** (1 - seeds):.3g}."
    )
    counts = f"{images['train']} training, {images['val']} validation and {images['test']} test images."
    return f"{text if seeds > 1 else 'One seed: no intervals.'} {counts}"


def _spread(entry: dict[str, Any], form: str) -> str:
    if not math.isfinite(entry["mean"]):
        return "diverged"
    spread = "" if entry["ci95"] is None else f" ± {entry['ci95']:{form.lstrip('+')}}"
    # adding 0.0 turns a rounded -0.0 into 0.0
    return f"{round(entry['mean'], int(form[-2])) + 0.0:{form}}{spread}"


def _probability(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value, ".3f")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
