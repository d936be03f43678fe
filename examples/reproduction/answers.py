"""The questions of the study and what its intervals allow to say, by one rule: yes, no or open."""

from __future__ import annotations

from collections.abc import Iterable

from . import statistics as stats
from .cells import chance, gap, table
from .protocol import label
from .stages import confirmed, count_collapsed, count_failed, missing, sweep_arms, sweep_rule, swept
from .statistics import CERTAIN, Difference, Quantity, Record, Results
from .tables import ABSENT

Row = list[str]
Differences = dict[tuple[str, ...], Difference | None]
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
    return {
        "answers": answers(results),
        "collapse": collapse(results),
        "effects": effects(results),
        "factors": factors(results),
        "phases": phases(results),
    }


def answers(results: Results) -> str:
    """One row a question, about the deep network where nothing else is said."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    rows = [["Does the linear baseline collapse to one path?", *_collapse(results, phase)]]
    for other in OTHERS:
        rows.append([f"Is spectral more accurate than {other}?", *_claim(results, phase, "spectral", other, "accuracy")])
    for rule in stats.rules_of(results, stats.select(results, "main", phase)):
        for other in OTHERS:
            question = f"Has spectral a higher delta than {other} at equal plasticity, {rule['name']}?"
            rows.append([question, *_claim(results, phase, "spectral", other, rule["name"])])
    question = "Is spectral more accurate than a linear gate with balance loss?"
    rows.append([question, *_claim(results, phase, "spectral", "baseline+balance", "accuracy")])
    rows.append(["What do balance loss, prototypes and penalty do, each by itself?", *_certain(_effects(results, phase))])
    elsewhere = {key: found for key, found in _phases(results).items() if key[0] != phase}
    rows.append(["Is spectral higher in the other phases, in accuracy or delta?", *_certain(elsewhere)])
    rows.append(["Which change of the spectral router's settings does something?", *_certain(_factors(results))])
    rows.append(["Does the best setting found beat both other routers on fresh seeds?", *_better(results)])
    return _words(table(["question", "answer", "numbers"], rows)) + f"\n{phase} where the question names no other.\n"


def collapse(results: Results) -> str:
    """Who ends on one path, under which condition."""
    groups: list[tuple[str, list[Record]]] = []
    for phase in results["protocol"]["main"]["phases"]:
        groups += [(f"{phase}, {arm}", stats.select(results, "main", phase, arm)) for arm in _arms(results, "main", phase)]
    groups += [(f"failure stage, {arm}", stats.select(results, "failure", arm=arm)) for arm in _arms(results, "failure")]
    if not groups:
        return ABSENT
    rows = []
    for name, records in groups:
        alone, lost = count_collapsed(results, records), count_failed(results, records)
        if alone:
            kept = count_collapsed(results, stats.trained(results, records))
            rows.append([name, f"{alone} of {len(records)}", f"{kept} of {alone}", f"{lost} of {len(records)}"])
    total = sum(len(records) for _, records in groups)
    if not rows:
        return f"None of {total} networks ended on one path.\n"
    told = f"Of {len(groups)} groups with {total} networks; the others have none on one path."
    return table(["", "on one path", "of these trained all the same", "failed"], rows) + f"\n{told}\n"


def effects(results: Results) -> str:
    """What each part adds, one change at a time."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    found = _effects(results, phase)
    labels = list(dict.fromkeys(label for _, label in found))
    rows = [
        [name, " − ".join(pair), *(_said(found[name, label], "raises", "lowers") for label in labels)]
        for name, pair in EFFECTS.items()
    ]
    return _words(table(["part", "difference", *labels], rows)) + f"\n{phase}. {_expected(found.values())}\n"


def factors(results: Results) -> str:
    """By factor of the sweep, the levels that differ from the center."""
    found = _factors(results)
    if not found:
        return ABSENT
    center = results["protocol"]["sweep"]["center"]
    quantities = list(dict.fromkeys(quantity for _, _, quantity in found))
    rows = []
    for factor in dict.fromkeys(factor for factor, _, _ in found):
        levels = list(dict.fromkeys(level for name, level, _ in found if name == factor))
        row = [factor, "; ".join(levels)]
        for quantity in quantities:
            certain = [level for level in levels if stats.side(found[factor, level, quantity])]
            told = [f"{level}: {_said(found[factor, level, quantity], '**higher**', '**lower**')}" for level in certain]
            row.append("<br>".join(told) or "open for every level")
        rows.append(row)
    head = ["factor", "levels", *(f"{quantity} − {center}" for quantity in quantities)]
    return _words(table(head, rows)) + f"\nValidation images of tuning seeds. {_expected(found.values())}\n"


def phases(results: Results) -> str:
    """Whether the claims for the deep network hold in each phase."""
    found = _phases(results)
    if not found:
        return ABSENT
    rows = [
        [phase, label, *(_said(found[phase, label, other], "yes", "no") for other in OTHERS)]
        for phase, label in dict.fromkeys((phase, label) for phase, label, _ in found)
    ]
    head = ["phase", "is spectral higher in", *(f"than {other}" for other in OTHERS)]
    return _words(table(head, rows)) + f"\n{_expected(found.values())}\n"


def _effects(results: Results, phase: str) -> Differences:
    labels = _labels(results, phase)
    return {
        (name, shown): _difference(results, phase, *pair, label)
        for name, pair in EFFECTS.items()
        for label, shown in labels.items()
    }


def _phases(results: Results) -> Differences:
    return {
        (phase, shown, other): _difference(results, phase, "spectral", other, label)
        for phase in results["protocol"]["main"]["phases"]
        if stats.select(results, "main", phase)
        for label, shown in _labels(results, phase).items()
        for other in OTHERS
    }


def _factors(results: Results) -> Differences:
    sweep, names = results["protocol"]["sweep"], sweep_arms(results)
    levels = {"router": [router for router in sweep["routers"] if router != sweep["center"]]}
    for factor, given in sweep["factors"].items():
        levels[factor] = [label(level if isinstance(level, dict) else {factor: level}) for level in given]
    shown = {"accuracy": "accuracy", "delta": f"delta at equal plasticity, {sweep_rule(results)['name']}"}
    return {
        (factor, level, shown[quantity]): swept(results, level, quantity)
        for factor, of_factor in levels.items()
        for level in of_factor
        if level in names
        for quantity in shown
    }


def _labels(results: Results, phase: str) -> dict[str, str]:
    """What is compared in a phase, and how it is called."""
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    return {"accuracy": "accuracy"} | {rule["name"]: f"delta at equal plasticity, {rule['name']}" for rule in rules}


def _certain(differences: Differences) -> Row:
    """How many intervals exclude 0, and which."""
    tested = {key: found for key, found in differences.items() if found is not None and found.enough}
    certain = {key: found for key, found in tested.items() if stats.side(found)}
    told = [f"{', '.join(key)}: {_numbers(found)}" for key, found in certain.items()]
    if not tested:
        return ["no runs", ""]
    return [f"{len(certain)} of {len(tested)} intervals exclude 0", "<br>".join([*told, _expected(tested.values())])]


def _claim(results: Results, phase: str, one: str, other: str, what: str) -> Row:
    found = _difference(results, phase, one, other, what)
    verdict = _verdict(found, "**yes**", "**no**")
    numbers = _numbers(found)
    sides = [stats.select(results, "main", phase, router) for router in (one, other)]
    if what == "accuracy" and any(count_failed(results, records) for records in sides):
        kept = stats.compare(results, "main", phase, one, other, stats.accuracy)
        numbers += f"; of the seeds that trained: {_numbers(kept)}"
    return [verdict, numbers]


def _collapse(results: Results, phase: str) -> Row:
    main = stats.select(results, "main", phase, "baseline")
    failure = {
        arm: stats.select(results, "failure", arm=arm) for arm in _arms(results, "failure") if arm.startswith("baseline, ")
    }
    groups = {f"in {phase}": main} | {arm.removeprefix("baseline, "): records for arm, records in failure.items()}
    alone = {name: count_collapsed(results, records) for name, records in groups.items() if records}
    everyone = [record for records in groups.values() for record in records]
    if not everyone:
        return ["no runs", ""]
    kept = count_collapsed(results, stats.trained(results, everyone))
    verdict = "**no**" if not any(alone.values()) else "**yes**" if sum(alone.values()) == len(everyone) else "**sometimes**"
    counts = "; ".join(f"{name}: {count} of {len(groups[name])}" for name, count in alone.items())
    return [verdict, f"{counts}." + (f" Of these trained all the same: {kept}." if any(alone.values()) else "")]


def _better(results: Results) -> Row:
    found = confirmed(results)
    if found is None:
        return ["no runs" if missing(results, "confirm") is None else "no verdict yet", missing(results, "confirm") or ""]
    told = [
        f"{label}, − {router}: {_numbers(difference)}"
        for (router, label), difference in found.differences.items()
        if label in found.decisive
    ]
    return ["**yes**" if found.shown else "**not shown**", f"{found.setting}. " + "; ".join(told)]


def _difference(results: Results, phase: str, one: str, other: str, what: str) -> Difference | None:
    """Of accuracy, over all seeds, or of delta at equal plasticity by the rule of that name."""
    quantity: Quantity = stats.accuracy
    if what != "accuracy":
        quantity = stats.equal(next(rule for rule in results["protocol"]["oneshot"]["rules"] if rule["name"] == what))
    return stats.compare(results, "main", phase, one, other, quantity, failed=what == "accuracy")


def _said(difference: Difference | None, better: str, worse: str) -> str:
    return f"{_verdict(difference, better, worse)}: {_numbers(difference)}"


def _verdict(difference: Difference | None, better: str, worse: str) -> str:
    if difference is None:
        return "no runs"
    if not difference.enough:
        return f"too few ({difference.n} of {difference.of})"
    return {1: better, -1: worse, 0: "open"}[stats.side(difference)]


def _numbers(difference: Difference | None) -> str:
    if difference is None:
        return "no pair of seeds"
    return f"{gap(difference)}, {chance(difference.p)}, n {difference.n}"


def _expected(differences: Iterable[Difference | None]) -> str:
    intervals = sum(found is not None and found.enough for found in differences)
    return f"{intervals} intervals: {CERTAIN * intervals:.1f} of them would be expected to exclude 0 if nothing differed."


def _arms(results: Results, stage: str, phase: str | None = None) -> list[str]:
    return stats.arms(stats.select(results, stage, phase))


def _words(text: str) -> str:
    """Words stand better at the left."""
    return text.replace("---:", "---")
