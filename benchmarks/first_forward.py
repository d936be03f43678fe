"""What watching the first training forward costs, and finding gates by an example, as ratios to a plain forward.

    python -m benchmarks.first_forward

Plain and watched forwards alternate in one process, on one model, so that drift of the machine hits both alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spectral_router import find_gates, wrap_moe

from ._harness import Clock, Report, device, progress, show_ms, show_ratio
from .wrap import build, command

WAYS = ("plain", "first, wrapped", "find_gates(example)")


def measure(
    repeats: int, quick: bool, *, layers: int = 16, dim: int = 256, hidden: int = 512, tokens: int = 512
) -> list[Report]:
    if quick:
        layers, dim, hidden, tokens = 2, 32, 32, 128
    model = build(layers, dim, hidden, experts=8).to(device())
    ids = torch.randint(1024, (max(1, tokens // 128), 128), device=device())
    report = Report(
        f"The first forward, Mixtral-like model of {layers} layers, dim {dim}, {tokens} tokens", ["forward", "ms", "/ plain"]
    )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    def timed(way: str, example: bool = False) -> None:
        clock = Clock()
        if example:
            find_gates(model, example={"input_ids": ids})
        else:
            model(input_ids=ids, labels=ids)
        clock.mark()
        seconds[way] += clock.seconds()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(input_ids=ids, labels=ids)
        for repeat in range(repeats):
            progress(f"first forward: {repeat + 1} of {repeats}")
            timed("plain")
            with wrap_moe(model):
                timed("first, wrapped")
            timed("find_gates(example)", example=True)
    report.raw = {"forward": seconds}
    for way in WAYS:
        report.rows.append([way, show_ms(seconds[way]), "1" if way == "plain" else show_ratio(seconds, way, "plain", 3)])
    report.notes = ["With the default penalty and balance loss in it. Once a run; later steps are in `benchmarks.wrap`."]
    return [report]


def main(argv: Sequence[str] | None = None) -> None:
    command("first_forward", __doc__, 15, measure, argv)


if __name__ == "__main__":
    main()
