"""The comparison's table and picture, both from results.json alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from examples.shared.runs import interval
from examples.shared.storage import write_atomically, write_text
from studies.oneshot.plasticity import interference
from studies.pages import comparison as pages
from studies.pages.tables import read

HEAD = (
    "arm",
    "strength",
    "accuracy, %",
    "worst seed, %",
    "accuracy − reference, points",
    "delta at equal plasticity, points",
    "stable rank",
    "paths ≥ 1 %",
    "I(class; path)/H(class)",
    "by chance",
    "importance CV²",
    "load CV²",
    "step time",
)
PRINTED = 7  # columns that a terminal has room for; tables.md has all
Results = dict[str, Any]


def write(results: Results, out: Path) -> list[Path]:
    """Print the table; write tables.md and comparison.png; return both."""
    lines = rows(results)
    table = Table(*HEAD[:PRINTED], title="Every penalty and balance loss in one experiment", title_justify="left")
    for row in lines:
        table.add_row(*row[:PRINTED])
    Console().print(table)
    print(footnote(results))
    text = "\n".join(["| " + " | ".join(row) + " |" for row in (HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *lines)])
    path, picture = out / "tables.md", out / "comparison.png"
    write_text(path, f"{text}\n\n{footnote(results)}\n\n{grid(results)}")
    figure = pages.picture(read(path))
    write_atomically(picture, partial(figure.savefig, format="png", dpi=130))
    plt.close(figure)
    return [path, picture]


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row an arm, cells as text."""
    lines: list[tuple[str, ...]] = []
    for name, runs in results["runs"].items():
        reference = results["runs"].get(results["reference"], [])
        difference = (
            _show([run["accuracy"] - other["accuracy"] for run, other in zip(runs, reference, strict=True)], "+.2f")
            if reference and name != results["reference"]
            else "–"
        )
        measured = [run["routing"] for run in runs]
        middle, low, high = results["step_time"][name]
        lines.append(
            (
                name,
                _strength(results, name),
                _show([run["accuracy"] for run in runs], ".2f"),
                f"{min(run['accuracy'] for run in runs):.1f}",
                difference,
                _show_interference(runs, results["plasticity"]),
                _show([fmean(run["stable_rank"]) for run in runs], ".2f"),
                _show([run["paths_used_1pct"] for run in measured], ".1f"),
                _show([run["mutual_information"] for run in measured], ".2f"),
                f"{fmean(run['mutual_information_chance'] for run in measured):.2f}",
                _show([fmean(run["importance_cv2"]) for run in measured], ".3f"),
                _show([fmean(run["load_cv2"]) for run in measured], ".3f"),
                f"{middle:.2f} ({low:.2f} - {high:.2f})",
            )
        )
    return lines


def footnote(results: Results) -> str:
    seeds, images, level = results["config"]["seeds"], results["data"]["images"]["test"], results["plasticity"]
    spread = f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t). " if seeds > 1 else "One seed. "
    rescued = sum(run["rescued"] for runs in results["runs"].values() for run in runs)
    return spread + (
        f"One of the {images} test images is {100 / images:.2f} points. Differences are paired by seed, against "
        f"{results['reference']}; each stands by itself, so of twenty intervals one is expected to miss the truth. Delta: the "
        f"change of test accuracy where the novel images' mean loss has fallen by {level:.0%}, above 0 a gain; in brackets how "
        "many seeds reached that, if not all. By chance: the information of shuffled paths. CV² and stable rank: mean over "
        "layers. Step time: ratio to a step without penalty, median (quartiles). ‡: the strength is the strongest or the "
        f"weakest of the grid. Prototypes planted anew by the rescue: {rescued}."
    )


def grid(results: Results) -> str:
    """How each strength was chosen, as Markdown."""
    lines = ["| arm | " + "mean validation accuracy by strength, % |", "|---|---|"]
    for name, scores in results["tuning"].items():
        if scores:
            lines.append(f"| {name} | " + ", ".join(f"{value}: {fmean(runs):.2f}" for value, runs in scores.items()) + " |")
    return "\n".join(lines) + "\n"


def _strength(results: Results, name: str) -> str:
    """What was chosen, and whether it is at an end of the grid."""
    chosen = results["chosen"][name]
    if chosen is None:
        return "–"
    grid = [float(value) for value in results["tuning"][name]]
    return f"{chosen:g}" + (" ‡" if chosen in (min(grid), max(grid)) else "")


def _show_interference(runs: list[dict[str, Any]], plasticity: float) -> str:
    known = [found for run in runs if (found := interference(run["oneshot"], plasticity)) is not None]
    if not known:
        return "not reached"
    return _show(known, "+.2f") + ("" if len(known) == len(runs) else f" ({len(known)})")


def _show(values: list[float], form: str) -> str:
    entry = interval(list(values))
    mean = round(entry["mean"], int(form[-2])) + 0.0  # a rounded -0.0 becomes 0.0
    return f"{mean:{form}}" + ("" if entry["ci95"] is None else f" ± {entry['ci95']:{form.lstrip('+')}}")
