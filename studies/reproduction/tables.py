"""The tables of the main stage: tables 1 and 2 beside the paper's, the update rules, the differences by seed."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from . import statistics as stats
from .cells import NOTHING, chance, gap, level, table
from .statistics import CERTAIN, Difference, Quantity, Record, Results

ABSENT = "*The results that this page was made of have no such runs.*\n"
# tables 1 and 2 of arXiv:2601.03889, a column a router; the classes in the order car, cat, elephant, face
PRINTED: dict[str, dict[str, tuple[str, list[str], str, str]]] = {
    "photos-2x2": {
        "baseline": ("84.23", ["-1.15", "-0.98", "-1.61", "-1.91"], "-1.41", "1 (collapsed)"),
        "clustering": ("83.28", ["+0.89", "+0.42", "+1.01", "-0.46"], "+0.47", "4"),
        "spectral": ("82.97", ["+1.17", "+0.36", "+0.29", "-0.20"], "+0.41", "4"),
    },
    "photos-4x4": {
        "baseline": ("71.61", ["-2.34", "-2.38", "-5.75", "-8.39"], "-4.72", "static (collapse)"),
        "clustering": ("76.76", ["-0.03", "-1.40", "-1.54", "-1.91"], "-1.22", "stochastic"),
        "spectral": ("80.44", ["-0.31", "-1.01", "+0.26", "-0.21"], "-0.32", "modular"),
    },
}
PAIRS = (  # the first minus the second
    ("spectral", "baseline"),
    ("spectral", "clustering"),
    ("clustering", "baseline"),
    ("spectral", "baseline+balance"),
    ("baseline+balance", "baseline"),
    ("clustering", "baseline+balance"),
    ("clustering", "clustering-balance"),
    ("clustering-balance", "baseline"),
    ("baseline+spectral", "baseline"),
)


def sections(results: Results) -> dict[str, str]:
    """Markdown by name; every name of the protocol is there, whatever the results hold."""
    made = {"rules": rules(results), "headroom": headroom(results)}
    for phase in results["protocol"]["main"]["phases"]:
        made[f"table-{phase}"] = main_table(results, phase)
        made[f"paired-{phase}"] = paired_table(results, phase)
    return made


def phase_title(results: Results, phase: str) -> str:
    """The data, the size of the network and, where there are smaller sets of the same data, of the set."""
    settings = results["protocol"]["main"]["phases"]
    one, each = settings[phase], "samples_per_class"
    sizes = {other.get(each) for other in settings.values() if other["data"] == one["data"]}
    classes = len(results["data"][phase]["classes"])
    told = f"{one['data']}, {classes} classes, {one['layers']} layers of {one['experts']} experts"
    return f"{told}, {one[each]} images a class" if len(sizes) > 1 else told


def main_table(results: Results, phase: str) -> str:
    everyone = stats.select(results, "main", phase)
    if not everyone:
        return ABSENT
    first, *_ = update_rules = stats.rules_of(results, everyone)
    rate, classes = stats.middle(first), results["data"][phase]["classes"]
    routers = routers_of(results, phase)
    of = {router: stats.select(results, "main", phase, router) for router in routers}
    paper = PRINTED.get(phase, {})

    def row(label: str, quantity: Quantity, form: str, *, trained: bool, reached: bool = False) -> list[str]:
        """Over all seeds, or those that trained; `reached` counts what is missing from those that trained."""
        cells = []
        for router in routers:
            records = stats.trained(results, of[router]) if trained else of[router]
            cells.append(level(stats.known(records, quantity).values(), form, len(records) if reached else len(of[router])))
        return [label, *cells]

    def update(label: str, name: str, form: str) -> list[str]:
        return row(label, stats.point(first, rate, name), form, trained=True)

    rows = [row("Accuracy before update, %", stats.accuracy, ".2f", trained=False)]
    printed = [[paper[router][0] for router in paper]]
    if any(stats.has_failed(results, record) for record in everyone):
        rows.append(row("the same, of the seeds that trained", stats.accuracy, ".2f", trained=True))
        printed.append([])
    rows += [update(f"Delta {name}, points", f"delta/{name}", "+.2f") for name in classes]
    printed += [[paper[router][1][index] for router in paper] for index in range(len(classes))]
    rows += [
        update("Mean delta, points", "mean_delta", "+.2f"),
        row("Paths used", stats.measured("paths_used"), ".1f", trained=False),
    ]
    printed += [[paper[router][2] for router in paper], [paper[router][3] for router in paper]]
    rows.append(row("Paths used by 1 % or more", stats.measured("paths_used_1pct"), ".1f", trained=False))
    rows += [
        row(f"Delta at equal plasticity, {rule['name']}", stats.equal(rule), "+.2f", trained=True, reached=True)
        for rule in update_rules
    ]
    rows += [
        update("Novel image: loss before", "novel_loss_before", ".3f"),
        update("Novel image: loss after", "novel_loss_after", ".3f"),
        update("Novel image: right before, %", "novel_accuracy_before", ".1f"),
        update("Novel image: right after, %", "novel_accuracy_after", ".1f"),
        row("Different paths that lead a class", stats.measured("dominant_paths"), ".1f", trained=False),
        row("I(class; path) / H(class)", stats.measured("mutual_information"), ".3f", trained=False),
        row("the same, by chance", stats.measured("mutual_information_chance"), ".3f", trained=False),
        row("Stable rank, mean over layers", stats.spectrum("stable_rank"), ".2f", trained=False),
        row("Share of the most used path", stats.measured("top_path_share"), ".2f", trained=False),
        ["Failed seeds", *(_count(of[router], lambda record: stats.has_failed(results, record)) for router in routers)],
        ["Seeds on one path", *(_count(of[router], lambda record: stats.is_collapsed(results, record)) for router in routers)],
    ]
    if paper:
        printed += [[]] * (len(rows) - len(printed))
        rows = [[cells[0], *(of_paper or [""] * len(paper)), *cells[1:]] for cells, of_paper in zip(rows, printed, strict=True)]
    head = ["", *(f"paper: {router}" for router in paper), *routers]
    return table(head, rows) + f"\n{_footnote(results, phase, len({record['seed'] for record in everyone}))}\n"


def rules(results: Results) -> str:
    """Every rule and rate: what the updates learn and what they cost."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    routers = routers_of(results, phase)
    of = {router: stats.trained(results, stats.select(results, "main", phase, router)) for router in routers}
    rows = []
    for rule in stats.rules_of(results, stats.select(results, "main", phase)):
        for rate in sorted(rule["rates"]):
            cells = []
            for router in routers:
                learned = stats.known(of[router], stats.point(rule, rate, "learned")).values()
                delta = stats.known(of[router], stats.point(rule, rate, "mean_delta")).values()
                cells.append(f"{fmean(learned):.0%}, {level(delta, '+.2f')}" if learned else NOTHING)
            rows.append([f"{rule['name']}, {rate:g}", *cells])
        cells = [level(stats.known(of[router], stats.equal(rule)).values(), "+.2f", len(of[router])) for router in routers]
        rows.append([f"**{rule['name']}, where {rule['plasticity']:.0%} is learned**", *cells])
    return (
        table(["rule, rate", *routers], rows)
        + f"\n{phase}. Share of the novel images' mean loss that the update takes away, mean delta.\n"
    )


def paired_table(results: Results, phase: str) -> str:
    """Differences by seed; one family of tests."""
    cells = differences(results, phase)
    if not cells:
        return ABSENT
    pairs = list(dict.fromkeys(pair for pair, _ in cells))
    labels = list(dict.fromkeys(label for _, label in cells))
    adjusted = dict(zip(cells, stats.holm([judged(found) for found in cells.values()]), strict=True))
    tested = [p for p in map(judged, cells.values()) if p is not None]
    certain = [key for key, p in adjusted.items() if p is not None and p < CERTAIN]
    seeds = len({record["seed"] for record in stats.select(results, "main", phase)})

    def cell(key: tuple[tuple[str, str], str]) -> str:
        found = cells[key]
        shown = gap(found, of=seeds)
        if found is None or found.p is None:
            return shown
        if not found.enough:
            return f"{shown}<br>too few"
        shown = f"**{shown}**" if found.p < CERTAIN else shown
        return f"{shown}{' †' if key in certain else ''}<br>{chance(found.p)}"

    rows = [[f"{one} − {other}", *(cell(((one, other), label)) for label in labels)] for one, other in pairs]
    small = sum(p < CERTAIN for p in tested)
    told = (
        f"{phase}, n {seeds} where no other n is given. {len(tested)} comparisons of enough pairs: p is below .05 in "
        f"{small} (bold), where {CERTAIN * len(tested):.1f} are expected by chance if nothing differs, and in {len(certain)} "
        "(†) also after Holm's adjustment for all of this table."
    )
    return table(["", *labels], rows) + f"\n{told}\n"


def differences(results: Results, phase: str) -> dict[tuple[tuple[str, str], str], Difference | None]:
    """By pair of routers and quantity."""
    records = stats.select(results, "main", phase)
    if not records:
        return {}
    present = stats.arms(records)
    quantities: list[tuple[str, Quantity, bool]] = [("accuracy", stats.accuracy, True)]
    if any(stats.has_failed(results, record) for record in records):
        quantities.append(("accuracy, seeds that trained", stats.accuracy, False))
    first, *_ = update_rules = stats.rules_of(results, records)
    rate = stats.middle(first)
    quantities.append((f"mean delta, {first['name']}, {rate:g}", stats.point(first, rate, "mean_delta"), False))
    quantities += [(f"delta at equal plasticity, {rule['name']}", stats.equal(rule), False) for rule in update_rules]
    return {
        ((one, other), label): stats.compare(results, "main", phase, one, other, quantity, failed=failed)
        for one, other in PAIRS
        if one in present and other in present
        for label, quantity, failed in quantities
    }


def headroom(results: Results) -> str:
    """Whether an update still teaches the test images, and whom: what delta is made of besides interference."""
    phase = stats.deepest(results)
    if phase is None:
        return ABSENT
    rows = []
    for rule in stats.rules_of(results, stats.select(results, "main", phase)):
        groups = []
        for router in routers_of(results, phase):
            records = stats.trained(results, stats.select(results, "main", phase, router))
            delta, before = stats.known(records, stats.equal(rule)), stats.known(records, stats.accuracy)
            groups.append([(before[seed], delta[seed]) for seed in delta])
        deltas = [delta for pairs in groups for _, delta in pairs]
        r = stats.within([pairs for pairs in groups if pairs])
        above = sum(delta > 0 for delta in deltas)
        rows.append([rule["name"], f"{above} of {len(deltas)}", "–" if r is None else f"{r:+.2f}"])
    head = ["", "networks with delta above 0", "correlation of delta with accuracy"]
    told = "Delta at equal plasticity; the correlation is within routers, over their seeds."
    return table(head, rows) + f"\n{phase}. {told}\n"


def routers_of(results: Results, phase: str) -> list[str]:
    present = stats.arms(stats.select(results, "main", phase))
    return [router for router in results["protocol"]["main"]["phases"][phase]["routers"] if router in present]


def _footnote(results: Results, phase: str, seeds: int) -> str:
    first = stats.rules_of(results, stats.select(results, "main", phase))[0]
    data = results["data"][phase]
    each = data["images"] // len(data["classes"])
    tested = (each - round(0.7 * each) - round(0.15 * each)) * len(data["classes"])
    spread = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t)" if seeds > 1 else "One seed, no intervals"
    )
    return (
        f"{spread}; in brackets of how many, where seeds failed or did not learn enough. One of the {tested} test images is "
        f"{100 / tested:.2f} points. Delta and novel images: {first['name']}, {stats.middle(first):g}, unless the row says "
        "otherwise."
    )


def _count(records: list[Record], holds: Any) -> str:
    return f"{sum(map(holds, records))} of {len(records)}"


def judged(found: Difference | None) -> float | None:
    """Its p, of enough pairs."""
    return found.p if found is not None and found.enough else None
