"""The results in a few sentences, made from the numbers."""

from __future__ import annotations

from . import failing, parts, posthoc, printed, routing
from . import statistics as stats
from .cells import gap, together, verdict
from .stages import confirmed, missing
from .statistics import Difference, Results
from .tables import ABSENT

OTHERS = ("baseline", "clustering")


def sections(results: Results) -> dict[str, str]:
    phase = stats.deepest(results)
    if phase is None:
        return {"headlines": ABSENT}
    made = [
        _accuracy(results, phase),
        _delta(results, phase),
        _harm(results, phase),
        _routing(results),
        _failures(results),
        _better(results),
    ]
    return {"headlines": "\n".join(f"- {sentence}" for sentence in made if sentence)}


def _accuracy(results: Results, phase: str) -> str:
    found = {other: parts.difference(results, phase, "spectral", other, "accuracy") for other in OTHERS}
    there = [one for one in printed.beside(results) if (one.phase, one.quantity) == (phase, "accuracy")]
    paper = {one.pair[1]: one for one in there if one.pair[0] == "spectral"}
    told = []
    for other, one in found.items():
        theirs = "" if other not in paper else f" (paper: {paper[other].paper:+.2f}, {_inside(paper[other].inside)})"
        told.append(f"spectral − {other} is {gap(one)}{theirs}")
    return f"**Accuracy, {phase}: {together([_plain(one) for one in found.values()])}.** In points, {'; '.join(told)}."


def _delta(results: Results, phase: str) -> str:
    found = {key: one for key, one in parts.phases_of(results).items() if key[1] != "accuracy"}
    enough = [one for one in found.values() if one is not None and one.enough]
    apart = sum(stats.side(one) != 0 for one in enough)
    paper = [one for one in printed.beside(results) if one.quantity == "mean delta" and one.pair[0] == "spectral"]
    inside = sum(one.inside for one in paper)
    told = f" Of the paper's {len(paper)} differences of delta between these routers, inside our intervals: {inside}."
    return (
        f"**Delta at equal plasticity: {apart} of {len(enough)} differences exclude 0**, of spectral from baseline or "
        f"clustering, over all phases and rules.{told if paper else ''} {_balanced(results, phase)}"
    )


def _balanced(results: Results, phase: str) -> str:
    rules = stats.rules_of(results, stats.select(results, "main", phase))
    found = [parts.difference(results, phase, "spectral", "baseline+balance", rule["name"]) for rule in rules]
    words = ["too few seeds" if one is not None and not one.enough else verdict(one, "higher", "lower") for one in found]
    return f"From a linear gate with balance loss, {phase}, by rule, spectral is: {together(words)}."


def _harm(results: Results, phase: str) -> str:
    rule = posthoc.harmful(results, phase)
    if rule is None or phase not in posthoc.phases(results):
        return ""
    found = {
        pair: one
        for (pair, name, what), one in posthoc.largest_of(results, phase).items()
        if (name, what) == (rule["name"], "delta")
    }
    shown = [(pair, found[pair]) for pair in routing.PAIRS if found.get(pair) is not None]
    told = "; ".join(f"{' − '.join(pair)} {gap(one)}, {verdict(one, 'higher', 'lower')}" for pair, one in shown)
    adjusted = parts.holm(posthoc.family(results, phase))
    return (
        f"**Where updates do harm** ({rule['name']}, {max(rule['rates']):g}; looked at after the results), mean delta: {told}. "
        f"Differences left {adjusted[0].lower()}{adjusted[1:]}"
    )


def _routing(results: Results) -> str:
    everything = routing.differences(results)
    told = []
    for pair in routing.PAIRS:
        found = {phase: one for (phase, of, what), one in everything.items() if (of, what) == (pair, routing.SEPARATION)}
        held = [phase for phase, one in found.items() if stats.side(one) > 0]
        told.append(
            f"{pair[0]} more than {pair[1]} in {len(held)} of {len(found)} phases" + (f" ({', '.join(held)})" if held else "")
        )
    return f"**Classes separated by path:** {'; '.join(told)}." if everything else ""


def _failures(results: Results) -> str:
    records = stats.select(results, "failure")
    if not records:
        return ""
    alone = failing.count_collapsed(results, records)
    kept = failing.count_collapsed(results, stats.trained(results, records))
    main = stats.select(results, "main", arm="baseline")
    on_one = failing.count_collapsed(results, main)
    spared = failing.count_collapsed(results, stats.trained(results, main))
    differing = []
    for condition, of in failing.conditions(results).items():
        lost = {name: count for name, (count, _) in of.items()}
        if 0 < sum(lost.values()) < sum(number for _, number in of.values()):
            shown = ", ".join(f"{name.replace(', ', ' at ')}: {count}" for name, count in lost.items())
            differing.append(f"{condition} ({shown})")
    each = next(iter(next(iter(failing.conditions(results).values())).values()))[1]
    return (
        f"**One path is how some networks fail:** of {len(main)} baselines of the main stage {on_one} ended on one, {spared} "
        f"of these trained; of {len(records)} networks of the failure stage {alone}, of which {kept} trained. Failures of "
        f"{each} where they depend on the router: {'; '.join(differing) or 'none'}."
    )


def _better(results: Results) -> str:
    found = confirmed(results)
    if found is None:
        return missing(results, "confirm") or ""
    shown = "shown" if found.shown else "not shown"
    return f"**A better setting: {shown}** by the one test that was fixed beforehand ({found.setting})."


def _plain(one: Difference | None) -> str:
    return verdict(one, "spectral is higher", "spectral is lower")


def _inside(inside: bool) -> str:
    return "inside our interval" if inside else "outside our interval"
