"""When a network fails, and what one path has to do with it."""

from __future__ import annotations

from studies.verdicts import SHOWN

from . import statistics as stats
from .cells import chance, level, table
from .statistics import Record, Results
from .tables import ABSENT

Counts = dict[str, tuple[int, int]]  # by arm: failed, of how many


def sections(results: Results) -> dict[str, str]:
    return {"failure": failure(results), "collapse": collapse(results)}


def failure(results: Results) -> str:
    records = stats.select(results, "failure")
    if not records:
        return ABSENT
    of_stage = results["protocol"]["failure"]
    names = list(of_stage["arms"])
    rows = []
    for condition in of_stage["conditions"]:
        row = [condition]
        for name in names:
            runs = _runs(results, name, condition)
            lost, alone = count_failed(results, runs), count_collapsed(results, runs)
            accuracies = stats.known(stats.trained(results, runs), stats.accuracy).values()
            row.append(f"{lost} / {alone} of {len(runs)}<br>{level(accuracies, '.1f')}")
        rows.append(row)
    lost, alone = count_failed(results, records), count_collapsed(results, records)
    kept = count_collapsed(results, stats.trained(results, records))
    told = (
        f"Failed / on one path, of how many, and the accuracy of those that trained, in %. Of the {len(records)} networks "
        f"{lost} failed; {alone} ended on one path, of which {kept} trained all the same. Failed over all conditions: "
        f"{'; '.join(_total(results, name) for name in names)}."
    )
    return table(["", *names], rows) + f"\n{told}\n"


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


def alone(results: Results, phase: str) -> list[str]:
    """Whether the linear baseline collapses to one path."""
    failing = [arm for arm in _arms(results, "failure") if arm.startswith("baseline, ")]
    groups = {f"in {phase}": stats.select(results, "main", phase, "baseline")}
    phases = [name for name in results["protocol"]["main"]["phases"] if name != phase]
    groups |= {
        f"in the {len(phases)} other phases": [
            one for name in phases for one in stats.select(results, "main", name, "baseline")
        ]
    }
    groups |= {arm.removeprefix("baseline, "): stats.select(results, "failure", arm=arm) for arm in failing}
    on_one = {name: count_collapsed(results, records) for name, records in groups.items() if records}
    everyone = [record for records in groups.values() for record in records]
    if not everyone:
        return ["no runs", ""]
    kept = count_collapsed(results, stats.trained(results, everyone))
    low, high = share(sum(on_one.values()), len(everyone))
    some = "**shown**" if low > 0.5 else "**refuted**" if high < 0.5 else SHOWN[0]
    counts = "; ".join(f"{name}: {count} of {len(groups[name])}" for name, count in on_one.items())
    return [some, f"{counts}. Of these {sum(on_one.values())} trained all the same: {kept}."]


def answer(results: Results) -> list[str]:
    """When a network fails, condition by condition, with an exact test where it depends on the router."""
    counts = conditions(results)
    if not counts:
        return ["no runs", ""]
    told, none, every = [], 0, 0
    for condition, of in counts.items():
        lost, total = sum(count for count, _ in of.values()), sum(number for _, number in of.values())
        if lost in (0, total):
            none, every = none + (lost == 0), every + (lost == total)
            told.append(f"{condition}: {'nobody fails' if lost == 0 else 'all fail'}.")
            continue
        shown = ", ".join(f"{name.replace(', ', ' at ')}: {count} of {number}" for name, (count, number) in of.items())
        tests = [
            f"against {other} {chance(fisher(of['spectral'], of[other]))}"
            for other in ("baseline", "clustering")
            if {"spectral", other} <= set(of)
        ]
        told.append(f"{condition} ({shown}). Fisher's exact test, spectral {', '.join(tests)}.")
    verdict = f"of {len(counts)} conditions, nobody in {none}, all in {every}, **by router in {len(counts) - none - every}**"
    return [verdict, "<br>".join(told)]


def conditions(results: Results) -> dict[str, Counts]:
    of_stage = results["protocol"]["failure"]
    found: dict[str, Counts] = {}
    for condition in of_stage["conditions"]:
        runs = {name: _runs(results, name, condition) for name in of_stage["arms"]}
        counts = {name: (count_failed(results, of), len(of)) for name, of in runs.items() if of}
        if counts:
            found[condition] = counts
    return found


def apart(results: Results) -> dict[str, Counts]:
    """The conditions in which it depends on the router who fails."""
    return {
        condition: of
        for condition, of in conditions(results).items()
        if 0 < sum(lost for lost, _ in of.values()) < sum(number for _, number in of.values())
    }


def share(count: int, of: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper and Pearson)."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(0.95, "exact")
    return float(low), float(high)


def fisher(one: tuple[int, int], other: tuple[int, int]) -> float:
    """p of Fisher's exact test, two-sided, that as many fail in both."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[lost, total - lost] for lost, total in (one, other)])[1])


def count_failed(results: Results, records: list[Record]) -> int:
    return sum(stats.has_failed(results, record) for record in records)


def count_collapsed(results: Results, records: list[Record]) -> int:
    return sum(stats.is_collapsed(results, record) for record in records)


def _total(results: Results, name: str) -> str:
    counts = [of[name] for of in conditions(results).values() if name in of]
    return f"{name}: {sum(lost for lost, _ in counts)} of {sum(number for _, number in counts)}"


def _runs(results: Results, name: str, condition: str) -> list[Record]:
    return stats.select(results, "failure", arm=f"{name}, {condition}")


def _arms(results: Results, stage: str, phase: str | None = None) -> list[str]:
    return stats.arms(stats.select(results, stage, phase))
