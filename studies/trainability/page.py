"""docs/trainability.md and its picture. Every sentence with a number is made here."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from examples.shared import figures as pictures
from examples.shared.command import ExperimentError
from examples.shared.storage import write_text
from studies.reproduction.cells import level, table
from studies.saved import Results
from studies.verdicts import SHOWN

from . import figures
from .results import Runs, Test, control, tests

PAGE, TABLES = "trainability.md", "trainability_tables.md"
COMMAND = "python -m studies.trainability"


def write(results: Results, docs: Path) -> list[Path]:
    if not Runs(results).seeds:
        raise ExperimentError("--results must hold one whole seed at least, got none; do more runs first")
    drawn = pictures.save(figures.FIGURES, results, docs / "images")
    write_text(docs / PAGE, page(results))
    write_text(docs / TABLES, tables(results))
    return [docs / PAGE, docs / TABLES, *drawn]


def page(results: Results) -> str:
    runs = Runs(results)
    n, arms = len(runs.seeds), len(runs.arms)
    rates = list(runs.at_depth(runs.depths[0]))
    wanted = results["protocol"]["failure"]["seeds"][1]
    parts = [
        f"<!-- made by `{COMMAND} page`; change studies/trainability/page.py -->",
        "# Trainability",
        "Which gates let the paper's network learn at all, as it gets deeper and the rate higher?\n"
        f"Ten digits, {runs.depths[0]} to {runs.depths[-1]} layers of four experts without residual, rates {rates[0]:g} to "
        f"{rates[-1]:g}, {arms} arms, {n} of the protocol's {wanted} seeds. A network counts as trained "
        f"from {results['protocol']['failed']['accuracy_below']:g} % on, twice chance. The protocol "
        "(`studies/trainability/study.toml`) was fixed before the runs.",
        "![Accuracy against the learning rate, a panel a depth](images/trainability.png)",
        answer(runs),
        f"Every cell: [tables](trainability_tables.md). Made by `{COMMAND} run` and `{COMMAND} page`.",
    ]
    return "\n\n".join(parts) + "\n"


def answer(runs: Runs) -> str:
    found = tests(runs)
    lines = ["## What holds", ""]
    for arm in runs.arms:
        if control(arm) is None:
            continue
        of_arm = [test for test in found if test.arm == arm]
        shown = [test for test in of_arm if test.trains == SHOWN[1]]
        refuted = [test for test in of_arm if test.trains == SHOWN[-1]]
        better = [test.condition for test in of_arm if test.better == SHOWN[1]]
        worse = [test.condition for test in of_arm if test.better == SHOWN[-1]]
        text = f"- **{arm}**, against {control(arm)}. Trains more often: "
        text += _cells(shown, runs) if shown else "not shown"
        text += f"; less often: {_cells(refuted, runs)}" if refuted else ""
        text += f". Higher accuracy shown in {len(better)} of {len(of_arm)} conditions"
        text += f", lower in {len(worse)}." if worse else "."
        lines.append(text)
    total = {arm: sum(runs.trained(arm, condition) for condition in runs.conditions) for arm in runs.arms}
    most = sorted(total, key=total.__getitem__, reverse=True)
    every = len(runs.seeds) * len(runs.conditions)
    listed = ", ".join(f"{arm} {total[arm]}" for arm in most)
    lines += ["", f"Trained over all conditions, of {every} networks each: {listed}."]
    return "\n".join(lines)


def _cells(found: list[Test], runs: Runs) -> str:
    n = len(runs.seeds)
    return ", ".join(f"{test.condition} ({test.trained[0]} against {test.trained[1]} of {n})" for test in found)


def tables(results: Results) -> str:
    runs = Runs(results)
    n = len(runs.seeds)
    parts = ["---\nsearch:\n  exclude: true\n---\n\n# Trainability: tables"]
    for depth in runs.depths:
        conditions = runs.at_depth(depth)
        rows = []
        for arm in runs.arms:
            cells = []
            for condition in conditions.values():
                accuracies = runs.accuracy(arm, condition).values()
                cells.append(
                    f"{level(accuracies, '.1f')}, worst {min(accuracies):.1f}<br>"
                    f"{runs.trained(arm, condition)} of {n} trained, "
                    f"{runs.one_path(arm, condition)} on one path"
                )
            rows.append([arm, *cells])
        parts.append(f"## {depth} layers\n\n" + table(["arm", *(f"rate {rate:g}" for rate in conditions)], rows))
    mean = {arm: fmean(value for c in runs.conditions for value in runs.accuracy(arm, c).values()) for arm in runs.arms}
    listed = ", ".join(f"{arm} {value:.1f}" for arm, value in sorted(mean.items(), key=lambda item: -item[1]))
    parts.append(f"Test accuracy in %, mean ± half-width of the 95 % interval. Mean over all conditions: {listed}.")
    parts.append("Versions: " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".")
    return "\n\n".join(parts) + "\n"
