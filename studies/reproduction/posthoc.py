"""What was looked at after the results had been seen, and so is in no protocol: it may suggest, and shows nothing."""

from __future__ import annotations

from statistics import fmean, stdev

from . import statistics as stats
from .cells import NOTHING, chance, gap, level, table
from .statistics import CERTAIN, Difference, Quantity, Record, Results, Rule
from .tables import ABSENT, PAIRS, judged, routers_of

Found = dict[tuple[tuple[str, str], str, str], Difference | None]
MORE = 0.3  # a share of the novel loss at which the updates of a path are not nearly nothing
LAST = 4  # epochs


def sections(results: Results) -> dict[str, str]:
    return {
        "largest": largest(results),
        "readings": readings(results),
        "more": more(results),
        "late": late(results),
    }


def largest(results: Results) -> str:
    """Who forgets what at the largest rate of each rule."""
    tables = []
    for phase in phases(results):
        found = largest_of(results, phase)
        rates = {rule["name"]: max(rule["rates"]) for rule in _rules(results, phase)}
        adjusted = dict(zip(found, stats.holm([judged(one) for one in found.values()]), strict=True))
        rows = []
        for pair in dict.fromkeys(pair for pair, _, _ in found):
            row = [" − ".join(pair)]
            for name in rates:
                parts = [(what, found[pair, name, what], adjusted[pair, name, what]) for what in ("delta", "learned")]
                row.append("<br>".join(f"{what} {_marked(one, p)}" for what, one, p in parts))
            rows.append(row)
        certain = sum(p is not None and p < CERTAIN for p in adjusted.values())
        tests = sum(p is not None for p in adjusted.values())
        told = (
            f"{phase}. Not in the protocol. Delta in points, learned in % of the novel images' loss; {tests} comparisons of "
            f"enough pairs: bold where p is below .05, † ({certain}) where it is also after Holm's adjustment for this table."
        )
        tables.append(table(["", *(f"{name}, {rate:g}" for name, rate in rates.items())], rows) + f"\n{told}\n")
    return "\n".join(tables) or ABSENT


def largest_of(results: Results, phase: str) -> Found:
    present = stats.arms(stats.select(results, "main", phase))

    def percent(rule: Rule) -> Quantity:
        read = stats.point(rule, max(rule["rates"]), "learned")

        def learned(record: Record) -> float | None:
            share = read(record)
            return None if share is None else 100 * share

        return learned

    return {
        (pair, rule["name"], what): stats.compare(results, "main", phase, *pair, quantity)
        for pair in PAIRS
        if set(pair) <= set(present)
        for rule in _rules(results, phase)
        for what, quantity in (
            ("delta", stats.point(rule, max(rule["rates"]), "mean_delta")),
            ("learned", percent(rule)),
        )
    }


def family(results: Results, phase: str) -> dict[tuple[str, ...], Difference | None]:
    """The comparisons of one table, by plain names."""
    return {(phase, *pair, name, what): one for (pair, name, what), one in largest_of(results, phase).items()}


def harmful(results: Results, phase: str) -> Rule | None:
    """The rule whose largest rate costs some router the most."""

    def worst(rule: Rule) -> float:
        read = stats.point(rule, max(rule["rates"]), "mean_delta")
        sides = [stats.trained(results, stats.select(results, "main", phase, router)) for router in routers_of(results, phase)]
        return min((fmean(of.values()) for records in sides if (of := stats.known(records, read))), default=0.0)

    return min(_rules(results, phase), key=worst, default=None)


def phases(results: Results) -> list[str]:
    """Those that were asked all rules, the one of the sweep first."""
    every = len(results["protocol"]["oneshot"]["rules"])
    found = [phase for phase in results["protocol"]["main"]["phases"] if len(_rules(results, phase)) == every]
    return sorted(found, key=lambda phase: phase != stats.deepest(results))


def readings(results: Results) -> str:
    """Between which rates delta at equal plasticity was read."""
    rows = []
    for phase in phases(results):
        records = stats.trained(results, stats.select(results, "main", phase))
        for rule in _rules(results, phase):
            first = stats.known(records_of(records), _learned(rule, min(rule["rates"])))
            reached = stats.known(records_of(records), stats.equal(rule))
            below = sum(first.get(key, 0.0) >= rule["plasticity"] for key in reached)
            share, total = f"{rule['plasticity']:.0%}", len(records)
            rows.append(
                [phase, rule["name"], share, f"{below} of {total}", f"{len(reached) - below}", f"{total - len(reached)}"]
            )
    if not rows:
        return ABSENT
    head = ["phase", "rule", "read where this is learned", "below the first rate", "between rates", "no rate reaches it"]
    return (
        table(head, rows)
        + "\nNetworks of the main stage that trained. Below the first rate the line begins at no update, with delta 0.\n"
    )


def records_of(records: list[Record]) -> list[Record]:
    """With a seed of their own, so that routers do not share one."""
    return [record | {"seed": index} for index, record in enumerate(records)]


def more(results: Results) -> str:
    """The comparison at equal plasticity, where more is learned."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    chosen = [rule | {"plasticity": MORE} for rule in _rules(results, phase) if rule["scope"] == "path"]
    present = routers_of(results, phase)
    pairs = [pair for pair in PAIRS if set(pair) <= set(present)]
    found = {
        (pair, rule["name"]): stats.compare(results, "main", phase, *pair, stats.equal(rule))
        for pair in pairs
        for rule in chosen
    }
    adjusted = dict(zip(found, stats.holm([judged(one) for one in found.values()]), strict=True))
    names = [rule["name"] for rule in chosen]
    rows = [[" − ".join(pair), *(_marked(found[pair, name], adjusted[pair, name]) for name in names)] for pair in pairs]
    told = (
        f"{phase}. Not in the protocol: delta where {MORE:.0%} of the novel images' loss is taken away. Bold: p below .05; †: "
        "also after Holm's adjustment for this table."
    )
    return table(["", *names], rows) + f"\n{told}\n"


def late(results: Results) -> str:
    """How much the network of the last epoch is one of several that it might have been."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    rows = []
    for router in routers_of(results, phase):
        records = stats.trained(results, stats.select(results, "main", phase, router))
        epochs = [record["val_accuracy"][-2 * LAST :] for record in records]
        ends = [values[-1] for values in epochs]
        noise = [stdev(values[-LAST:]) for values in epochs if len(values) >= 2 * LAST]
        gains = [fmean(values[-LAST:]) - fmean(values[:LAST]) for values in epochs if len(values) >= 2 * LAST]
        rows.append(
            [
                router,
                f"{fmean(noise):.2f}" if noise else NOTHING,
                f"{stdev(ends):.2f}" if len(ends) > 1 else NOTHING,
                level(gains, "+.2f"),
            ]
        )
    head = ["", f"SD within a run, last {LAST} epochs", "SD between seeds, last epoch", f"last {LAST} − the {LAST} before"]
    told = [f"{one} − {other} {_numbers(late_difference(results, phase, one, other))}" for one, other in LATE]
    return (
        table(head, rows)
        + f"\n{phase}, validation images, points of accuracy. Mean of the last {LAST} epochs, paired by seed (not in the "
        f"protocol): {'; '.join(told)}.\n"
    )


LATE = (("spectral", "clustering"), ("spectral", "baseline"))


def late_difference(results: Results, phase: str, one: str, other: str) -> Difference | None:
    return stats.compare(results, "main", phase, one, other, lambda record: fmean(record["val_accuracy"][-LAST:]), failed=True)


def _rules(results: Results, phase: str) -> list[Rule]:
    return stats.rules_of(results, stats.select(results, "main", phase))


def _learned(rule: Rule, rate: float) -> Quantity:
    return stats.point(rule, rate, "learned")


def _marked(found: Difference | None, adjusted: float | None) -> str:
    shown = _numbers(found)
    if found is None or found.p is None or not found.enough:
        return shown if found is None else f"{shown}, too few"
    shown = f"**{shown}**" if found.p < CERTAIN else shown
    return f"{shown}{' †' if adjusted is not None and adjusted < CERTAIN else ''}"


def _numbers(found: Difference | None) -> str:
    if found is None:
        return NOTHING
    return f"{gap(found, of=found.of)}, {chance(found.p)}"
