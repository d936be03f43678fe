"""The paper's tables 1 and 2 (they have the same rows), and what they leave out, as text and as Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.shared.storage import write_text

Rows = list[tuple[str, list[str]]]


def write(results: dict[str, Any], out: Path) -> None:
    """Print the tables and write them to tables.md."""
    titled = [(title(results), adaptation_rows(results)), ("Routing and spectra", routing_rows(results))]
    routers = list(results["summary"])
    console = Console()
    for heading, rows in titled:
        table = Table("", *routers, title=escape(heading), title_justify="left")
        for label, cells in rows:
            table.add_row(escape(label), *cells)
        console.print(table)
    text = "\n".join(f"### {heading}\n\n{markdown(rows, routers)}" for heading, rows in titled) + f"\n{footnote(results)}\n"
    console.print(footnote(results), soft_wrap=True, highlight=False)
    write_text(out / "tables.md", text)


def title(results: dict[str, Any]) -> str:
    config = results["config"]
    number = {(2, 2): "As table 1: ", (4, 4): "As table 2: "}.get((config["layers"], config["experts"]), "")
    images = results["data"]["images"]
    each = (images["train"] + images["val"] + images["test"]) // len(results["data"]["classes"])
    return (
        f"{number}{config['layers']} layers, {config['experts']} experts, {each} images a class, "
        f"one-shot scope {config['scope']}, seeds {len(results['seeds'])}"
    )


def adaptation_rows(results: dict[str, Any]) -> Rows:
    classes = results["data"]["classes"]
    rows = [_row(results, "Accuracy before update, %", "accuracy", ".2f")]
    rows += [_row(results, f"Delta {name}, points", f"delta/{name}", "+.2f") for name in classes]
    rows += [
        _row(results, "Mean delta, points", "mean_delta", "+.2f"),
        _row(results, "Novel image: loss before", "novel_loss_before", ".3f"),
        _row(results, "Novel image: loss after", "novel_loss_after", ".3f"),
        _row(results, "Novel image: right before, %", "novel_accuracy_before", ".1f"),
        _row(results, "Novel image: right after, %", "novel_accuracy_after", ".1f"),
        _row(results, "Paths used", "paths_used", ".1f"),
        _row(results, "Paths used by 1 % or more", "paths_used_1pct", ".1f"),
    ]
    return rows


def routing_rows(results: dict[str, Any]) -> Rows:
    layers = range(1, results["config"]["layers"] + 1)
    rows = [
        _row(results, "Share of the most used path", "top_path_share", ".2f"),
        _row(results, "Different paths that lead a class", "dominant_paths", ".1f"),
        _row(results, "I(class; path) / H(class)", "mutual_information", ".3f"),
        _row(results, "the same, by chance", "mutual_information_chance", ".3f"),
    ]
    for label, name in (
        ("Importance CV²", "importance_cv2"),
        ("Load CV²", "load_cv2"),
        ("Routing entropy / log K", "entropy"),
        ("Spectral norm", "spectral_norm"),
        ("Stable rank", "stable_rank"),
    ):
        rows += [_row(results, f"{label}, layer {layer}", f"{name}/{layer}", ".3f") for layer in layers]
    paths: Rows = []
    for name in results["data"]["classes"]:
        cells = [_class_path(runs[0]["routing"]["class_paths"][name]) for runs in results["runs"].values()]
        paths.append((f"Main path of {name}, seed 0", cells))
    return rows + paths


def footnote(results: dict[str, Any]) -> str:
    images, seeds = results["data"]["images"], len(results["seeds"])
    spread = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t)." if seeds > 1 else "One seed: no intervals."
    )
    return f"{spread} One of the {images['test']} test images is {100 / images['test']:.2f} points."


def markdown(rows: Rows, routers: list[str]) -> str:
    lines = ["| | " + " | ".join(routers) + " |", "|---|" + "---:|" * len(routers)]
    for label, cells in rows:
        escaped = label.replace("|", "\\|")
        lines.append(f"| {escaped} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _row(results: dict[str, Any], label: str, name: str, form: str) -> tuple[str, list[str]]:
    cells = []
    for summary in results["summary"].values():
        entry = summary[name]
        spread = "" if entry["ci95"] is None else f" ± {entry['ci95']:{form.lstrip('+')}}"
        # deltas that cancel leave -1e-15; adding 0.0 turns a rounded -0.0 into 0.0
        mean = round(entry["mean"], int(form[-2])) + 0.0
        cells.append(f"{mean:{form}}{spread}")
    return label, cells


def _class_path(entry: dict[str, Any]) -> str:
    share = entry["share"]
    return entry["path"] if share is None or math.isnan(share) else f"{entry['path']} ({share:.0%})"
