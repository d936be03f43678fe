"""The search for a better setting, and its test."""

from __future__ import annotations

from typing import NamedTuple

from . import choice
from . import statistics as stats
from .cells import chance, gap, level, table
from .failing import count_failed
from .statistics import Difference, Quantity, Results
from .sweep import sweep_rule
from .tables import ABSENT


class Confirmed(NamedTuple):
    """The one test, when all its runs are there: the setting, and by router and quantity its difference."""

    setting: str
    differences: dict[tuple[str, str], Difference | None]
    decisive: list[str]  # the quantities that the verdict is about
    shown: bool


def sections(results: Results) -> dict[str, str]:
    return {
        "second": second(results),
        "confirm": confirm(results),
    }


def second(results: Results) -> str:
    if not stats.select(results, "second"):
        return ABSENT
    names = candidates(results)
    rule = sweep_rule(results)
    center = names[0]
    rows = []
    for name in names:
        runs = stats.select(results, "second", arm=name)
        kept = stats.trained(results, runs)
        difference = stats.compare(results, "second", None, name, center, stats.accuracy, failed=True)
        rows.append(
            [
                f"**{name}**" if name == chosen(results) else name,
                level(stats.known(runs, stats.accuracy).values(), ".2f"),
                "" if name == center else gap(difference),
                level(stats.known(kept, stats.equal(rule)).values(), "+.2f", len(kept)),
                f"{count_failed(results, runs)} of {len(runs)}",
            ]
        )
    head = ["candidate", "validation accuracy, %", f"− {center}", f"delta at equal plasticity, {rule['name']}", "failed"]
    told = missing(results, "second") or "Bold: the one that goes into the test below."
    return table(head, rows) + f"\n{told}\n"


def confirm(results: Results) -> str:
    found = confirmed(results)
    if found is None:
        lacks = missing(results, "confirm")
        return f"*{lacks}*\n" if lacks else ABSENT
    records = stats.select(results, "confirm")
    arms = [found.setting, *results["protocol"]["confirm"]["routers"]]
    seeds = len({record["seed"] for record in records})
    labels = list(dict.fromkeys(label for _, label in found.differences))
    quantities = dict(_tested(results))
    rows = []
    for label in labels:
        row = [label]
        for name in arms:
            runs = stats.select(results, "confirm", arm=name)
            kept = runs if label == "accuracy" else stats.trained(results, runs)
            row.append(
                level(stats.known(kept, quantities[label]).values(), ".2f" if label == "accuracy" else "+.2f", len(runs))
            )
        for name in arms[1:]:
            difference = found.differences[name, label]
            row.append(gap(difference, of=seeds) + ("" if difference is None else f"<br>{chance(difference.p)}"))
        rows.append(row)
    rows.append(["failed", *(_failed_of(results, name) for name in arms), *[""] * len(arms[1:])])
    decisive = " and ".join(found.decisive)
    alpha = results["protocol"]["confirm"]["alpha_level"]
    told = (
        f"{seeds} fresh seeds, test images, differences paired by seed. The rule was: shown only if {decisive} are better "
        f"than those of both other routers, each with p < {alpha:g}. All of these must hold, so nothing is adjusted for their "
        f"number. **{'Shown' if found.shown else 'Not shown'}.**"
    )
    return table(["", *arms, *(f"− {name}" for name in arms[1:])], rows) + f"\n{told}\n"


def confirmed(results: Results) -> Confirmed | None:
    setting = chosen(results)
    if setting is None or not stats.select(results, "confirm", arm=setting) or missing(results, "confirm"):
        return None
    of_stage = results["protocol"]["confirm"]
    tested = _tested(results)
    found = {
        (router, label): stats.compare(results, "confirm", None, setting, router, quantity, failed=label == "accuracy")
        for router in of_stage["routers"]
        for label, quantity in tested
    }
    decisive = [label for label, _ in tested[:2]]  # accuracy, and interference by the first rule

    def better(difference: Difference | None) -> bool:
        if difference is None or difference.p is None:
            return False
        return difference.mean > 0 and difference.p < float(of_stage["alpha_level"])

    shown = all(better(difference) for (_, label), difference in found.items() if label in decisive)
    return Confirmed(setting, found, decisive, shown)


def chosen(results: Results) -> str | None:
    """What was put to the test; before that the candidate that will be, once all have run."""
    routers = results["protocol"]["confirm"]["routers"]
    tested = [arm for arm in stats.arms(stats.select(results, "confirm")) if arm not in routers]
    if tested:
        return tested[0]
    if missing(results, "second"):
        return None
    tried = stats.select(results, "second")
    return choice.winner(tried) if tried else None


def missing(results: Results, stage: str) -> str | None:
    """What a stage still lacks, in words; None for one that has all its runs, or none."""
    records = stats.select(results, stage)
    arms = set(stats.arms(records))
    if stage == "confirm" and records:  # all routers, and one setting
        arms |= set(results["protocol"]["confirm"]["routers"])
        arms |= {"the setting"} if arms == set(results["protocol"]["confirm"]["routers"]) else set()
    wanted = len(arms) * stats.seeds_of(results, stage)
    return f"{len(records)} of {wanted} runs, no verdict yet." if len(records) < wanted else None


def candidates(results: Results) -> list[str]:
    """The center first, then by accuracy."""
    center = results["protocol"]["sweep"]["center"]
    names = stats.arms(stats.select(results, "second"))
    return sorted(names, key=lambda name: (name != center, -_mean_accuracy(results, name)))


def _tested(results: Results) -> list[tuple[str, Quantity]]:
    rules = stats.rules_of(results, stats.select(results, "confirm"))
    return [("accuracy", stats.accuracy)] + [
        (f"delta at equal plasticity, {rule['name']}", stats.equal(rule)) for rule in rules
    ]


def _failed_of(results: Results, name: str) -> str:
    runs = stats.select(results, "confirm", arm=name)
    return f"{count_failed(results, runs)} of {len(runs)}"


def _mean_accuracy(results: Results, name: str) -> float:
    values = stats.known(stats.select(results, "second", arm=name), stats.accuracy).values()
    return sum(values) / len(values) if values else 0.0
