"""docs/trainability.md, its tables and pictures. Every sentence with a number is made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from examples.shared import figures as pictures
from examples.shared.command import ExperimentError
from examples.shared.storage import write_text
from studies.reproduction.cells import level, table
from studies.reproduction.tables import main_table, paired_table
from studies.saved import Results
from studies.verdicts import SHOWN, unbroken

from . import figures, printed
from .results import TRAINED, Runs, Test, control, tests

PAGE, TABLES = "trainability.md", "trainability_tables.md"
COMMAND = "python -m studies.trainability"
STEPS = ("prototypes+balance", "spectral")  # from the linear gate to the paper's router, one part at a time
OF_STEPS = ("Prototypes instead of a linear gate", "The paper's penalty on the prototypes")


ARMS = (
    "`linear` is the paper's baseline, `prototypes+balance` its clustering router, `spectral` has its penalty too. "
    "`gate rate / 10`: the gates learn at a tenth of the rate. `residual`: each layer's input is added to its output, which "
    "the paper does not do. `relative`: the penalty in units of its targets, at strength 1. `norm term alone`: equation 3 "
    "alone. `projected`: the prototypes are put on the penalty's optimum after each step."
)


def write(results: Results, docs: Path) -> list[Path]:
    if not Runs(results).conditions:
        raise ExperimentError("--results must hold a condition with one whole seed at least, got none; do more runs first")
    drawn = pictures.save(figures.FIGURES, results, docs / "images")
    write_text(docs / PAGE, page(results))
    write_text(docs / TABLES, tables(results))
    return [docs / PAGE, docs / TABLES, *drawn]


def page(results: Results) -> str:
    runs = Runs(results)
    found = tests(runs)
    rates = sorted({one.changes["lr"] for one in runs.conditions.values()})
    layers = sorted({one.changes["layers"] for one in runs.conditions.values()})
    chance = " and ".join(
        f"{runs.chance(phase):g} % for {phase}" for phase in dict.fromkeys(one.phase for one in runs.conditions.values())
    )
    counts = [len(runs.seeds(name)) for name in runs.conditions]
    parts = [
        f"<!-- made by `{COMMAND} page`; change studies/trainability/page.py -->",
        "# Trainability",
        "Which gates let the paper's network learn at all, at depths and rates where some do and some do not?",
        answer(runs, found),
        "![Test accuracy of every network of five arms, a panel for each depth and rate](images/trainability.png)",
        f"*Chance is {chance}; a network has trained from {TRAINED} times that on. {layers[0]} to {layers[-1]} layers of "
        f"four experts, rates {rates[0]:g} to {rates[-1]:g}; {len(runs.arms)} arms in {len(runs.conditions)} conditions, "
        f"{_seeds(counts)} seeds each, none tuned; shown are five arms in the conditions of most seeds. The protocol "
        "(`studies/trainability/study.toml`) was fixed before the runs.*",
        ARMS,
        each_arm(runs, found),
        "## Accuracy against the rate",
        "![Test accuracy against the learning rate, a panel for each depth](images/trainability_accuracy.png)",
        "*Means of networks that learn and of networks that do not: between the two there may be none.*",
        printed.section(results),
        f"[Every cell](trainability_tables.md). Made by `{COMMAND} run --photos FOLDER` and `{COMMAND} page`; without photos "
        "the digits run, from inside a package.",
    ]
    return unbroken("\n\n".join(part for part in parts if part) + "\n")


def answer(runs: Runs, found: Sequence[Test]) -> str:
    """Three sentences."""
    lines = []
    for arm, name in zip(STEPS, OF_STEPS, strict=True):
        of_arm = [test for test in found if test.arm == arm]
        lines.append(f"- **{name}**: {_tally(of_arm)}.")
    total = {arm: sum(runs.trained(arm, condition) for condition in runs.conditions) for arm in runs.arms}
    every = sum(len(runs.seeds(condition)) for condition in runs.conditions)
    most = sorted(total, key=total.__getitem__, reverse=True)
    listed = ", ".join(f"{arm} {total[arm]}" for arm in most[1:])
    lines.append(f"- **Most networks train with {most[0]}**: {total[most[0]]} of {every}; the others: {listed}.")
    return "\n".join(lines)


def _tally(of_arm: Sequence[Test]) -> str:
    """In how many conditions what is shown."""
    n = len(of_arm)

    def count(words: Sequence[str], more: str, less: str) -> str:
        shown, refuted = words.count(SHOWN[1]), words.count(SHOWN[-1])
        told = f"{more} shown in {shown} of {n} conditions" if shown else f"{more} not shown"
        return told + (f", {less} in {refuted}" if refuted else "")

    trains = count([test.trains for test in of_arm], "training more often is", "less often")
    return f"{trains}; {count([test.better for test in of_arm], 'a higher accuracy is', 'a lower one')}"


def each_arm(runs: Runs, found: Sequence[Test]) -> str:
    lines = ["## Arm by arm", ""]
    for arm in runs.arms:
        if control(arm) is None:
            continue
        of_arm = [test for test in found if test.arm == arm]
        cells = [(word, [test for test in of_arm if test.trains == SHOWN[side]]) for side, word in ((1, "More"), (-1, "Less"))]
        told = "".join(f" {word} often: {_cells(there)}." for word, there in cells if there)
        lines.append(f"- **{arm}**, against {control(arm)}: {_tally(of_arm)}.{told}")
    lines.append(
        "\nTrained: Fisher's exact test; accuracy: a paired test over the seeds; both corrected for all comparisons of "
        "this page (Holm). “Not shown” is no proof of nothing."
    )
    return "\n".join(lines)


def _cells(found: Sequence[Test]) -> str:
    return ", ".join(f"{test.condition} ({test.trained[0]} against {test.trained[1]} of {test.of})" for test in found)


def _seeds(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def tables(results: Results) -> str:
    runs = Runs(results)
    parts = ["---\nsearch:\n  exclude: true\n---\n\n# Trainability: tables"]
    for phase, layers in runs.panels:
        of_rates = runs.panel(phase, layers)
        rows = []
        for arm in runs.arms:
            cells = []
            for one in of_rates.values():
                accuracies = runs.accuracy(arm, one.name).values()
                cells.append(
                    f"{level(accuracies, '.1f')}, worst {min(accuracies):.1f}<br>"
                    f"{runs.trained(arm, one.name)} of {len(accuracies)} trained, {runs.one_path(arm, one.name)} on one path"
                )
            rows.append([arm, *cells])
        parts.append(f"## {phase}, {layers} layers\n\n" + table(["arm", *(f"rate {rate:g}" for rate in of_rates)], rows))
    mean = {arm: fmean(value for c in runs.conditions for value in runs.accuracy(arm, c).values()) for arm in runs.arms}
    listed = ", ".join(f"{arm} {value:.1f}" for arm, value in sorted(mean.items(), key=lambda item: -item[1]))
    parts.append(f"Test accuracy in %, mean ± half-width of the 95 % interval. Mean over all networks: {listed}.")
    for phase, number in printed.TABLES.items():
        if printed.ran(results, phase):
            parts.append(f"## As the paper's table {number}\n\n{main_table(results, phase)}\n{paired_table(results, phase)}")
    made_with = "; ".join(", ".join(f"{name} {number}" for name, number in one.items()) for one in results["versions"])
    parts.append(f"Versions: {made_with}.")
    return "\n\n".join(parts) + "\n"
