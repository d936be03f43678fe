"""The penalty as gates, experts and width grow, forward + backward: by `svdvals` literally, ours in the loss, ours at the step.

python -m benchmarks.growth
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from spectral_router import SpectralRankPenalty

from ._harness import Report, interleave, parser, progress, publish, show_ms, show_ratio
from .penalty import at_the_step, fresh, gates, literal, ours, step

# gates L, experts K, width d: one of them grows, the others stay
BASE = {"L": 8, "K": 32, "d": 1024}
QUICK_BASE = {"L": 2, "K": 4, "d": 16}
GROWING = {"L": (2, 8, 32, 128), "K": (4, 8, 16, 32, 64, 128, 256), "d": (256, 1024, 4096, 16384)}
NAMES = {"L": "gates", "K": "experts", "d": "width"}
TITLE = "Penalty, cost in the "
TITLES = {"L": f"{TITLE}number of gates", "K": f"{TITLE}number of experts", "d": f"{TITLE}width"}
WAYS = {"svdvals": "literal, svdvals", "loss": "in the loss", "step": "at the step"}


def contenders(count: int, experts: int, dim: int) -> dict[str, Callable[[], object]]:
    weights = gates(count, experts, dim)
    gradients = [torch.randn_like(weight) for weight in weights]
    values = partial(literal, norm=lambda weight: torch.linalg.svdvals(weight)[0])
    return {
        "svdvals": partial(fresh, weights, values),
        "loss": partial(fresh, weights, partial(ours, penalty=SpectralRankPenalty(relative=True))),
        "step": partial(step, weights, gradients, at_the_step(weights)),
    }


def measure(repeats: int, quick: bool) -> list[Report]:
    reports = []
    for name, sizes in GROWING.items():
        base = QUICK_BASE if quick else BASE
        report = Report(
            TITLES[name],
            [
                f"{NAMES[name]} {name}",
                *(f"{way}, ms" for way in WAYS.values()),
                "svdvals / in the loss",
                "svdvals / at the step",
            ],
        )
        report.notes = [", ".join(f"{other} = {base[other]}" for other in base if other != name) + "."]
        for size in sizes[:2] if quick else sizes:
            progress(f"{size} {NAMES[name]}")
            shape = {**base, name: size}
            seconds = interleave(contenders(shape["L"], shape["K"], shape["d"]), repeats)
            report.raw[str(size)] = seconds
            report.rows.append(
                [str(size), *(show_ms(seconds[way]) for way in WAYS)]
                + [show_ratio(seconds, "svdvals", way, 1) for way in ("loss", "step")]
            )
        reports.append(report)
    return reports


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("growth", __doc__, repeats=15).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
