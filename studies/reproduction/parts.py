"""What one change does: a part of the router, a level of the sweep; and whether the comparison holds in every phase."""

from __future__ import annotations

from collections.abc import Mapping

from . import statistics as stats
from .cells import NOTHING, expected, numbers, said, verdict, words
from .protocol import label, rule_of
from .statistics import CERTAIN, Difference, Quantity, Results
from .sweep import sweep_arms, sweep_rule, swept
from .tables import ABSENT, judged

Differences = Mapping[tuple[str, ...], Difference | None]
OTHERS = ("baseline", "clustering")
EFFECTS = {  # what changes between the second and the first
    "balance loss, on a linear gate": ("baseline+balance", "baseline"),
    "balance loss, on prototypes": ("clustering", "clustering-balance"),
    "prototypes for a linear gate, without balance loss": ("clustering-balance", "baseline"),
    "prototypes for a linear gate, with balance loss": ("clustering", "baseline+balance"),
    "spectral penalty, on prototypes with balance loss": ("spectral", "clustering"),
    "spectral penalty, on a linear gate": ("baseline+spectral", "baseline"),
}


def sections(results: Results) -> dict[str, str]:
    return {"effects": effects(results), "factors": factors(results), "phases": phases(results)}


def effects(results: Results) -> str:
    """What each part adds, one change at a time."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    found = effects_of(results, phase)
    shown = list(dict.fromkeys(name for _, name in found))
    rows = [
        [name, " − ".join(pair), *(said(found[name, label], "raises", "lowers") for label in shown)]
        for name, pair in EFFECTS.items()
    ]
    return words(["part", "difference", *shown], rows) + f"\n{phase}. {expected(found.values())}\n"


def factors(results: Results) -> str:
    """By factor of the sweep, the levels that differ from the center."""
    found = factors_of(results)
    if not found:
        return ABSENT
    center = results["protocol"]["sweep"]["center"]
    quantities = list(dict.fromkeys(quantity for _, _, quantity in found))
    rows = []
    for factor in dict.fromkeys(factor for factor, _, _ in found):
        levels = list(dict.fromkeys(level for name, level, _ in found if name == factor))
        row = [factor, "; ".join(levels)]
        for quantity in quantities:
            of = {level: found[factor, level, quantity] for level in levels}
            told = [f"{level}: {said(one, '**higher**', '**lower**')}" for level, one in of.items() if stats.side(one)]
            told += [f"{level}: {verdict(one)}" for level, one in of.items() if one is not None and not one.enough]
            row.append("<br>".join(told) or "not shown for any level")
        rows.append(row)
    head = ["factor", "levels", *(f"{quantity} − {center}" for quantity in quantities)]
    return words(head, rows) + f"\nValidation images of tuning seeds. {expected(found.values())} {holm(found)}\n"


def phases(results: Results) -> str:
    """Whether the claims for the deep network hold in each phase, in a word each."""
    found = phases_of(results)
    if not found:
        return ABSENT
    shown = list(dict.fromkeys(name for _, name, _ in found))

    def cell(phase: str, name: str) -> str:
        of = {other: found[phase, name, other] for other in OTHERS if (phase, name, other) in found}
        return "; ".join(f"{other}: {verdict(one)}" for other, one in of.items()) or NOTHING

    rows = [[phase, *(cell(phase, name) for name in shown)] for phase in dict.fromkeys(phase for phase, _, _ in found)]
    return words(["spectral is higher in", *shown], rows) + f"\n{expected(found.values())}\n"


def effects_of(results: Results, phase: str) -> Differences:
    return {
        (name, shown): difference(results, phase, *pair, what)
        for name, pair in EFFECTS.items()
        for what, shown in labels(results, phase).items()
    }


def phases_of(results: Results) -> Differences:
    return {
        (phase, shown, other): difference(results, phase, "spectral", other, what)
        for phase in results["protocol"]["main"]["phases"]
        if stats.select(results, "main", phase)
        for what, shown in labels(results, phase).items()
        for other in OTHERS
    }


def factors_of(results: Results) -> Differences:
    """Of the spectral router's own settings; the unchanged other routers are in the table of the sweep."""
    names = sweep_arms(results)
    levels = {
        factor: [label(level if isinstance(level, dict) else {factor: level}) for level in given]
        for factor, given in results["protocol"]["sweep"]["factors"].items()
    }
    shown = {"accuracy": "accuracy", "delta": f"delta at equal plasticity, {sweep_rule(results)['name']}"}
    return {
        (factor, level, shown[quantity]): swept(results, level, quantity)
        for factor, of_factor in levels.items()
        for level in of_factor
        if level in names
        for quantity in shown
    }


def labels(results: Results, phase: str) -> dict[str, str]:
    """What is compared in a phase, and how it is called."""
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    return {"accuracy": "accuracy"} | {rule["name"]: f"delta at equal plasticity, {rule['name']}" for rule in rules}


def difference(results: Results, phase: str, one: str, other: str, what: str) -> Difference | None:
    """Of accuracy, over all seeds, or of delta at equal plasticity by the rule of that name."""
    quantity: Quantity = stats.accuracy
    if what != "accuracy":
        quantity = stats.equal(rule_of(results["protocol"], what))
    return stats.compare(results, "main", phase, one, other, quantity, failed=what == "accuracy")


def certain(differences: Differences) -> list[str]:
    """How many intervals exclude 0, and which."""
    tested = {key: found for key, found in differences.items() if found is not None and found.enough}
    if not tested:
        return ["no runs", ""]
    apart = {key: found for key, found in tested.items() if stats.side(found)}
    told = [f"{', '.join(key)}: {numbers(found)}" for key, found in apart.items()]
    left = sum(found is not None for found in differences.values()) - len(tested)
    told.append(f"{expected(tested.values())} {holm(tested)}" + (f" Of too few pairs, and left out: {left}." if left else ""))
    return [f"{len(apart)} of {len(tested)} intervals exclude 0", "<br>".join(told)]


def holm(differences: Differences) -> str:
    ps = [p for p in map(judged, differences.values()) if p is not None]
    kept = sum(p is not None and p < CERTAIN for p in stats.holm(ps))
    return f"After Holm's adjustment for all {len(ps)}: {kept}."
