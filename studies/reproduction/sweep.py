"""The sweep: one setting of the spectral router changed at a time, and what the choice of candidates makes of it."""

from __future__ import annotations

from statistics import fmean

from . import choice, protocol
from . import statistics as stats
from .cells import gap, level, table
from .failing import count_failed
from .statistics import Difference, Quantity, Results
from .tables import ABSENT


def sections(results: Results) -> dict[str, str]:
    return {"sweep": sweep(results)}


def sweep(results: Results) -> str:
    records = stats.select(results, "sweep")
    if not records:
        return ABSENT
    center = results["protocol"]["sweep"]["center"]
    rule = sweep_rule(results)
    rows = []
    for name in sweep_arms(results):
        runs = stats.select(results, "sweep", arm=name)
        kept = stats.trained(results, runs)
        harm = stats.known(kept, stats.equal(rule)).values()
        accuracies = stats.known(runs, stats.accuracy).values()
        differences = [swept(results, name, quantity) for quantity in ("accuracy", "delta")]
        rows.append(
            [
                f"**{name}**" if name == center else name,
                level(accuracies, ".2f"),
                f"{min(accuracies):.1f}",
                "" if name == center else gap(differences[0], of=len(runs)),
                level(harm, "+.2f", len(kept)),
                "" if name == center else gap(differences[1], of=len(runs)),
                *(level(stats.known(runs, stats.spectrum(part)).values(), ".2f") for part in ("stable_rank", "spectral_norm")),
                level(stats.known(runs, stats.measured("entropy")).values(), ".2f"),
                f"{count_failed(results, runs)} of {len(runs)}",
                _passes(results, name),
            ]
        )
    head = ["", "accuracy, %", "worst seed", f"− {center}", "delta at equal plasticity", f"− {center}"]
    told = (
        f"Validation images; differences are paired by seed. Delta: {rule['name']}, where {rule['plasticity']:.0%} of the "
        "novel images' loss is taken away, of the seeds that trained; in brackets how many of those reach that. Stable rank, "
        "spectral norm and entropy (over log K): mean over layers. Passes: whether the level is above the center in mean "
        "accuracy and not below it in mean delta, as the choice of candidates asks; a trained seed that does not learn enough "
        "fails the second."
    )
    head += ["stable rank", "spectral norm", "entropy", "failed", "passes"]
    return table(head, rows) + f"\n{told}\n\n{trade(results)}\n"


def trade(results: Results) -> str:
    """Why the choice by delta is a choice against accuracy."""
    rule, center = sweep_rule(results), results["protocol"]["sweep"]["center"]
    others = set(results["protocol"]["sweep"]["routers"]) - {center}
    groups = {}
    for name in sweep_arms(results):
        kept = stats.trained(results, stats.select(results, "sweep", arm=name))
        before, delta = stats.known(kept, stats.accuracy), stats.known(kept, stats.equal(rule))
        if delta and name not in others:
            groups[name] = [(before[seed], delta[seed]) for seed in delta]
    means = [(fmean(x for x, _ in pairs), fmean(y for _, y in pairs)) for pairs in groups.values()]
    among, inside = stats.within([means]) if means else None, stats.within(groups.values())
    if among is None or inside is None:
        return ""
    best = max((name for name in groups if name != center), key=lambda name: _accuracy_gain(results, name))
    return (
        f"Delta goes with accuracy: over the settings the means correlate by {among:+.2f}, over the seeds within a setting "
        f"by {inside:+.2f}. What is less accurate gains more by an update, so the second condition favours settings that train "
        f"worse. The most accurate setting, {best} ({gap(swept(results, best, 'accuracy'))}): {_passes(results, best)}."
    )


def _accuracy_gain(results: Results, name: str) -> float:
    found = swept(results, name, "accuracy")
    return found.mean if found else 0.0


def _passes(results: Results, name: str) -> str:
    """The two conditions of the choice of candidates; nothing for the center and the unchanged routers."""
    sweep = results["protocol"]["sweep"]
    if name in sweep["routers"]:
        return ""
    accurate, harmless = choice.passes(results["protocol"], stats.select(results, "sweep"), name)
    return f"accuracy {'yes' if accurate else 'no'}, delta {'yes' if harmless else 'no'}"


def sweep_arms(results: Results) -> list[str]:
    present = stats.arms(stats.select(results, "sweep"))
    return [name for name in protocol.sweep_arms(results["protocol"]) if name in present]


def sweep_rule(results: Results) -> stats.Rule:
    return protocol.rule_of(results["protocol"], results["protocol"]["sweep"]["rules"][0])


def swept(results: Results, name: str, quantity: str) -> Difference | None:
    """An arm of the sweep minus its center: "accuracy" over all seeds, or "delta" at equal plasticity."""
    center = results["protocol"]["sweep"]["center"]
    read: Quantity = stats.accuracy if quantity == "accuracy" else stats.equal(sweep_rule(results))
    return stats.compare(results, "sweep", None, name, center, read, failed=quantity == "accuracy")
