"""The claims that the study looks at, and what its intervals allow to say, by one rule: shown, refuted or not shown."""

from __future__ import annotations

from studies.verdicts import SHOWN

from . import failing, parts, posthoc, printed, routing
from . import statistics as stats
from .cells import gap, numbers, said, together, verdict, words
from .failing import count_failed
from .stages import confirmed, missing
from .statistics import Results
from .tables import ABSENT

Row = list[str]
OTHERS = ("baseline", "clustering", "baseline+balance")


def sections(results: Results) -> dict[str, str]:
    return {"answers": answers(results)}


def answers(results: Results) -> str:
    """One row a claim, about the deep network where nothing else is said."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    rows = [
        ["The linear baseline collapses to one path", *failing.alone(results, phase)],
        ["When a network fails", *failing.answer(results)],
    ]
    for other in OTHERS:
        rows.append([f"Spectral is more accurate than {other}", *_accuracy(results, phase, other)])
    for other in OTHERS:
        rows.append([f"Spectral has a higher delta than {other} at equal plasticity", *_delta(results, phase, other)])
    rows.append(["The paper's differences fit into our intervals", *_printed(results)])
    rows.append(["Who forgets most where updates do harm (not in the protocol)", *_harm(results, phase)])
    for other in OTHERS:
        question = f"Spectral separates the classes by path more than {other}"
        rows.append([question, *routing.answer(results, ("spectral", other), routing.SEPARATION)])
    question = "So does the balance loss alone, on a linear gate"
    rows.append([question, *routing.answer(results, ("baseline+balance", "baseline"), routing.SEPARATION)])
    question = "The penalty raises the stable rank"
    rows.append([question, *routing.answer(results, ("spectral", "clustering"), "stable rank")])
    question = "Balance loss, prototypes and penalty change accuracy or delta, each by itself"
    rows.append([question, *parts.certain(parts.effects_of(results, phase))])
    elsewhere = {key: found for key, found in parts.phases_of(results).items() if key[0] != phase}
    rows.append(["Spectral differs in the other phases, in accuracy or delta", *parts.certain(elsewhere)])
    question = "Another setting of the spectral router differs"
    rows.append([question, *parts.certain(parts.factors_of(results))])
    told = [f"spectral − {other}: {said(posthoc.late_difference(results, phase, 'spectral', other))}" for other in OTHERS[:2]]
    question = f"The same, on validation images, mean of the last {posthoc.LAST} epochs (not in the protocol)"
    rows.insert(5, [question, together([one.split(": ")[1] for one in told]), "<br>".join(told)])
    rows.append(["The best setting found beats both other routers on fresh seeds", *_better(results)])
    return words(["claim", "verdict", "numbers"], rows) + f"\n{phase} where the row names no other.\n"


def _accuracy(results: Results, phase: str, other: str) -> Row:
    found = parts.difference(results, phase, "spectral", other, "accuracy")
    told = numbers(found)
    sides = [stats.select(results, "main", phase, router) for router in ("spectral", other)]
    if any(count_failed(results, records) for records in sides):
        kept = stats.compare(results, "main", phase, "spectral", other, stats.accuracy)
        told += f"; of the seeds that trained: {numbers(kept)}"
    return [verdict(found), told]


def _delta(results: Results, phase: str, other: str) -> Row:
    rules = [rule["name"] for rule in stats.rules_of(results, stats.select(results, "main", phase))]
    found = {name: parts.difference(results, phase, "spectral", other, name) for name in rules}
    verdicts = ["too few" if one is not None and not one.enough else verdict(one) for one in found.values()]
    return [together(verdicts), "<br>".join(f"{name}: {said(one)}" for name, one in found.items())]


def _printed(results: Results) -> Row:
    found = printed.beside(results)
    if not found:
        return ["no runs", ""]
    told = [
        f"{one.phase}, {one.quantity}, {' − '.join(one.pair)}: paper {one.paper:+.2f}, ours {gap(one.ours)}"
        for one in found
        if one.pair[0] == "spectral" and not one.inside
    ]
    inside = sum(one.inside for one in found)
    return [f"**{inside} of {len(found)}** do", "<br>".join(["Outside, of spectral:", *told]) if told else ""]


def _harm(results: Results, phase: str) -> Row:
    rule = posthoc.harmful(results, phase)
    if rule is None:
        return ["no runs", ""]
    rows, verdicts = [], []
    for place in posthoc.phases(results):
        found = posthoc.largest_of(results, place)
        for pair in routing.PAIRS:
            one = found.get((pair, rule["name"], "delta"))
            rows.append(f"{place}, {' − '.join(pair)}: {said(one, 'higher', 'lower')}")
            if place == phase and pair[1] == "baseline":
                verdicts.append(f"{pair[0]} keeps more than baseline: {verdict(one)}, by itself")
    if not rows:
        return ["no runs", ""]
    learned = posthoc.largest_of(results, phase).get((("spectral", "baseline"), rule["name"], "learned"))
    rows.append(f"Novel loss taken away there, in %, {phase}, spectral − baseline: {said(learned, 'higher', 'lower')}")
    every = parts.holm({key: one for place in posthoc.phases(results) for key, one in posthoc.family(results, place).items()})
    rows.append(f"In the tables of the largest rates, differences left {every[0].lower()}{every[1:]}")
    return ["; ".join(verdicts), "<br>".join([f"Mean delta, {rule['name']}, {max(rule['rates']):g}.", *rows])]


def _better(results: Results) -> Row:
    found = confirmed(results)
    if found is None:
        lacks = missing(results, "confirm")
        return ["no runs", ""] if lacks is None else ["no verdict yet", lacks]
    told = [
        f"{label}, − {router}: {numbers(difference)}"
        for (router, label), difference in found.differences.items()
        if label in found.decisive
    ]
    return ["**shown**" if found.shown else SHOWN[0], f"{found.setting}. " + "; ".join(told)]
