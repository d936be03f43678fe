"""Whether a router separates the classes by path, the paper's main claim: its figures, paired by seed."""

from __future__ import annotations

from studies.verdicts import SHOWN

from . import statistics as stats
from .cells import chance, gap, said, table, verdict
from .statistics import CERTAIN, Difference, Quantity, Record, Results
from .tables import ABSENT, judged

PAIRS = (
    ("spectral", "baseline"),
    ("spectral", "clustering"),
    ("spectral", "baseline+balance"),
    ("baseline+balance", "baseline"),
)
SEPARATION = "(I(class; path) − chance) / H(class)"


def information(record: Record) -> float | None:
    """What the path tells of the class, beyond what so many paths tell by chance."""
    whole, by_chance = (stats.measured(name)(record) for name in ("mutual_information", "mutual_information_chance"))
    return None if whole is None or by_chance is None else whole - by_chance


QUANTITIES: dict[str, Quantity] = {
    SEPARATION: information,
    "paths that lead a class": stats.measured("dominant_paths"),
    "share of the top path": stats.measured("top_path_share"),
    "stable rank": stats.spectrum("stable_rank"),
}


def sections(results: Results) -> dict[str, str]:
    found = differences(results)
    if not found:
        return {"routing": ABSENT}
    adjusted = dict(zip(found, stats.holm([judged(one) for one in found.values()]), strict=True))

    def cell(key: tuple[str, tuple[str, str], str]) -> str:
        one, p = found[key], adjusted[key]
        shown = gap(one, of=one.of if one else None)
        if one is None or not one.enough or one.p is None:
            return shown
        shown = f"**{shown}**" if one.p < CERTAIN else shown
        return f"{shown}{' †' if p is not None and p < CERTAIN else ''}<br>{chance(one.p)}"

    rows = [
        [phase, " − ".join(pair), *(cell((phase, pair, name)) for name in QUANTITIES)]
        for phase, pair in dict.fromkeys((phase, pair) for phase, pair, _ in found)
    ]
    told = "All seeds. Bold: p below .05; †: also after Holm's adjustment for this table."
    return {"routing": table(["phase", "", *QUANTITIES], rows) + f"\n{told}\n"}


def differences(results: Results) -> dict[tuple[str, tuple[str, str], str], Difference | None]:
    """By phase, pair and quantity."""
    return {
        (phase, pair, name): stats.compare(results, "main", phase, *pair, quantity, failed=True)
        for phase in results["protocol"]["main"]["phases"]
        for pair in PAIRS
        if set(pair) <= set(stats.arms(stats.select(results, "main", phase)))
        for name, quantity in QUANTITIES.items()
    }


def answer(results: Results, pair: tuple[str, str], name: str) -> list[str]:
    """In which phases, and the numbers of those where 0 is excluded and of the deep one."""
    found = {phase: one for (phase, of, what), one in differences(results).items() if (of, what) == (pair, name)}
    if not found:
        return ["no runs", ""]
    held = {
        word: [phase for phase, one in found.items() if verdict(one, SHOWN[1], SHOWN[-1]) == word]
        for word in (SHOWN[1], SHOWN[-1])
    }
    verdicts = [f"**{word}** in {', '.join(phases)}" for word, phases in held.items() if phases]
    rest = len(found) - sum(map(len, held.values()))
    if rest:
        verdicts.append(f"{SHOWN[0]} in {rest} of {len(found)} phases" if rest < len(found) else f"{SHOWN[0]} in any phase")
    shown = [phase for phase in found if phase == stats.deepest(results) or stats.side(found[phase])]
    return ["; ".join(verdicts), "<br>".join(f"{phase}: {said(found[phase], 'higher', 'lower')}" for phase in shown)]
