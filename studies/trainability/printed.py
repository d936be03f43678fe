"""The signs of the paper's tables 1 and 2, where the linear gate trains, but as badly as the paper says."""

from __future__ import annotations

from statistics import fmean

from studies.reproduction import statistics as stats
from studies.reproduction.cells import gap, table
from studies.reproduction.printed import beside
from studies.saved import Results
from studies.verdicts import SHOWN, holm, of_effect

TABLES = {"photos-4x4": 2, "photos-2x2": 1}
TOO_FEW = "too few trained"


def ran(results: Results, phase: str) -> bool:
    return bool(stats.select(results, "main", phase))


def section(results: Results) -> str:
    """Empty without photos."""
    found = beside(results)
    if not found:
        return ""
    # seen from the paper's sign; delta has only a network that trains
    ps = holm([one.ours.p if one.ours.enough else None for one in found])
    words = [of_effect(p, one.ours.mean * one.paper) if one.ours.enough else TOO_FEW for one, p in zip(found, ps, strict=True)]
    rows = [
        [
            f"table {TABLES[one.phase]}",
            f"{one.quantity}: {' − '.join(one.pair)}",
            f"{one.paper:+.2f}",
            gap(one.ours, of=one.ours.of),
            word,
        ]
        for one, word in zip(found, words, strict=True)
    ]
    same = sum(one.ours.mean * one.paper > 0 for one in found)
    shown, refuted = (words.count(SHOWN[side]) for side in (1, -1))
    head = ["paper", "", "paper's", "ours", "the paper's sign"]
    return (
        "## The paper's tables, where the linear gate trains badly\n\n"
        f"{_regimes(results)} Of the paper's {len(found)} differences {shown} are shown to have its sign there, "
        f"{refuted} the other (Holm, over all of them); by their means alone {same} have it. {_paths(results)}\n\n"
        + table(head, rows)
    )


def _regimes(results: Results) -> str:
    told = []
    for phase, number in TABLES.items():
        of_linear = stats.known(stats.select(results, "main", phase, "baseline"), stats.accuracy)
        if of_linear:
            rate = results["protocol"]["main"]["phases"][phase]["lr"]
            told.append(f"table {number}: rate {rate:g}, {fmean(of_linear.values()):.1f} % over {len(of_linear)} seeds")
    return (
        "Photos, images, layers and experts as in the paper, and of a few rates the one at which the linear gate without "
        f"balance came nearest to its accuracy there on seeds of their own ({'; '.join(told)})."
    )


def _paths(results: Results) -> str:
    runs = [run for phase in TABLES for run in stats.select(results, "main", phase, "baseline")]
    alone = [run for run in runs if stats.is_collapsed(results, run)]
    trained = len(stats.trained(results, alone))
    return f"The linear gate ends on one path, as the paper says, in {len(alone)} of {len(runs)}; of these train {trained}."
