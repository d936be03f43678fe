"""What reproduces and what does not, in ten lines: each a claim, its verdict by one rule, and the numbers that decide it."""

from __future__ import annotations

from collections.abc import Sequence

from studies.verdicts import RULE, SHOWN, Test, label, unbroken, word

from . import failing, parts, printed, routing
from . import statistics as stats
from .cells import chance, gap, span
from .stages import confirmed, missing
from .statistics import Difference, Record, Results
from .tables import ABSENT

FEW = f" Of less than {stats.ENOUGH:.0%} of the seeds nothing is said."


def sections(results: Results) -> dict[str, str]:
    phase = stats.deepest(results)
    if phase is None:
        return {"verdict": ABSENT}
    made = [
        _rank(results),
        _trains(results),
        _accuracy(results, phase),
        _delta(results),
        _balanced(results, phase),
        _separation(results),
        _balance_separates(results),
        _one_path(results),
        _better(results),
        _left(results),
    ]
    text = "\n".join(f"- {line}" for line in made if line)
    return {"verdict": unbroken(f"{text}\n\n{RULE}{FEW}\n")}


def _line(found: Sequence[Difference | None], claim: str, of: str) -> str:
    tests = [Test(one.p, 1 if one.mean > 0 else -1) for one in found if one is not None and one.enough and one.p is not None]
    return f"**{label(word(tests, of))}: {claim}**"


def _rank(results: Results) -> str:
    found = _by_phase(results, ("spectral", "clustering"), "stable rank")
    means = [one.mean for one in found.values() if one is not None]
    if not means:
        return ""
    said = _line(list(found.values()), "the penalty raises the stable rank of the gates", "phases")
    return f"{said}, by {span(means, '+.2f')} over {len(means)} phases."


def _trains(results: Results) -> str:
    """Whether the penalty's network trains where others fail."""
    apart = failing.apart(results)
    if not apart:
        return ""
    others = [name for name in next(iter(apart.values())) if ", " not in name and name != "spectral"]
    pairs = {(condition, name): failing.fisher(of["spectral"], of[name]) for condition, of in apart.items() for name in others}
    tests = [
        Test(p, 1 if apart[condition]["spectral"][0] < apart[condition][name][0] else -1)
        for (condition, name), p in pairs.items()
    ]
    said = f"**{label(word(tests, 'comparisons'))}: spectral trains where other routers fail.** "
    told = []
    for condition, of in apart.items():
        lost = ", ".join(f"{name} {of[name][0]}" for name in ("spectral", *others))
        warm = ", ".join(f"{name.partition(', ')[0]} {count}" for name, (count, _) in of.items() if ", " in name)
        told.append(f"failed at {condition}: {lost}" + (f" (at temperature 1 {warm})" if warm else ""))
    total = next(iter(next(iter(apart.values())).values()))[1]
    least = min(pairs, key=lambda pair: pairs[pair])
    adjusted = [p for p in stats.holm(list(pairs.values())) if p is not None]
    return (
        f"{said}Of {total}, {'; '.join(told)}. The clearest, against {least[1]} at {least[0]}: {chance(pairs[least])} by "
        f"Fisher's exact test, {chance(min(adjusted))} after adjustment for {len(adjusted)}. {_reached(results, least[0])}"
    )


def _reached(results: Results, condition: str) -> str:
    runs = stats.trained(results, stats.select(results, "failure", arm=f"spectral, {condition}"))
    if not runs:
        return ""
    return f"Those of spectral that train there end at {span([run['accuracy'] for run in runs], '.0f')} % accuracy."


def _accuracy(results: Results, phase: str) -> str:
    found = {key: one for key, one in parts.phases_of(results).items() if key[1] == "accuracy"}
    there = {one.pair: one.paper for one in printed.beside(results) if (one.phase, one.quantity) == (phase, "accuracy")}
    paper = {other: f" (paper {there['spectral', other]:+.2f})" for other in parts.OTHERS if ("spectral", other) in there}
    told = [f"over {other} {gap(found[phase, 'accuracy', other])}{paper.get(other, '')}" for other in parts.OTHERS]
    said = _line(list(found.values()), "spectral is more accurate than baseline or clustering", "comparisons")
    return f"{said}, in {_phases(found)} phases. In points, {phase}, {'; '.join(told)}."


def _delta(results: Results) -> str:
    found = {key: one for key, one in parts.phases_of(results).items() if key[1] != "accuracy"}
    enough = [one for one in found.values() if one is not None and one.enough]
    if not enough:
        return ""
    said = _line(enough, "spectral interferes less than baseline or clustering", "comparisons")
    inside = sum(abs(one.mean) + (one.half or 0.0) < 1 for one in enough)
    return (
        f"{said}, compared where updates teach equally much: in {_phases(found)} phases, by all update rules, {len(enough)} "
        f"differences, of which {inside} are surely below a point."
    )


def _balanced(results: Results, phase: str) -> str:
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    found = {rule["name"]: parts.difference(results, phase, "spectral", "baseline+balance", rule["name"]) for rule in rules}
    enough = {name: one for name, one in found.items() if one is not None and one.enough}
    if not enough:
        return ""
    said = _line(list(enough.values()), "it interferes less than a linear gate with balance loss", "update rules")
    told = "; ".join(f"{name} {gap(one)}" for name, one in enough.items())
    return f"{said}. Delta, spectral − baseline+balance, {phase}: {told}."


def _separation(results: Results) -> str:
    found = {
        (other, phase): one
        for other in ("baseline", "clustering", "baseline+balance")
        for phase, one in _by_phase(results, ("spectral", other), routing.SEPARATION).items()
    }
    if not found:
        return ""
    said = _line(list(found.values()), "spectral separates classes by path more than other routers", "comparisons")
    alone = [f"{phase} over {other}" for (other, phase), one in found.items() if stats.side(one) > 0]
    told = f" Without adjustment {len(alone)} would be: {', '.join(alone)}." if alone else ""
    return f"{said}, in {len(found)} comparisons with three of them.{told}"


def _balance_separates(results: Results) -> str:
    found = _by_phase(results, ("baseline+balance", "baseline"), routing.SEPARATION)
    if not found:
        return ""
    said = _line(list(found.values()), "the balance loss alone, on a linear gate, separates them", "phases")
    told = "; ".join(f"{phase} {gap(one)}" for phase, one in found.items() if stats.side(one) > 0)
    return said + (f" (information of the path on the class, of 1: {told})." if told else ".")


def _one_path(results: Results) -> str:
    """The paper's baseline is on one path in both of its tables."""
    main = stats.select(results, "main", arm="baseline")
    if not main:
        return ""
    count = failing.count_collapsed(results, main)
    low, high = failing.share(count, len(main))
    verdict = SHOWN[1] if low > 0.5 else SHOWN[-1] if high < 0.5 else SHOWN[0]
    failed = [run for run in _baselines(results) if stats.has_failed(results, run)]
    alone = failing.count_collapsed(results, failed)
    told = f" One path is what a failed baseline looks like: {alone} of {len(failed)}." if failed else ""
    return (
        f"**{label(verdict)}: the linear baseline collapses to one path.** {count} of {len(main)} do; the 95 % interval of "
        f"that share ends at {high:.0%}, below one half.{told}"
    )


def _baselines(results: Results) -> list[Record]:
    everyone = stats.select(results, "failure")
    return [run for run in everyone if run["arm"].partition(", ")[0] == "baseline"]


def _better(results: Results) -> str:
    found = confirmed(results)
    if found is None:
        return missing(results, "confirm") or ""
    told = "; ".join(f"over {router} {gap(one)}" for (router, name), one in found.differences.items() if name == "accuracy")
    verdict = SHOWN[1] if found.shown else SHOWN[0]
    return (
        f"**{label(verdict)}: a better setting**, by the one test that was fixed beforehand ({found.setting}); accuracy {told}."
    )


def _left(results: Results) -> str:
    """Whether "not shown" leaves room for the paper's effects."""
    found = printed.beside(results)
    if not found:
        return ""
    inside = sum(one.inside for one in found)
    return (
        f"**How large an effect is left:** of the {len(found)} differences that the paper's tables print, {inside} lie inside "
        "our intervals; the others are larger than what could have been missed here."
    )


def _by_phase(results: Results, pair: tuple[str, str], name: str) -> dict[str, Difference | None]:
    return {phase: one for (phase, of, what), one in routing.differences(results).items() if (of, what) == (pair, name)}


def _phases(found: parts.Differences) -> int:
    return len({phase for phase, *_ in found})
