"""Every benchmark, or those named, one after the other: under ten minutes on two cores, or on a GPU.

python -m benchmarks
python -m benchmarks penalty wrap --json figures.json --markdown figures.md
python -m benchmarks --device cuda --json figures.json --data PHOTOS
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from . import _harness, cost, delivery, experts, growth, launches, penalty, router, startup, tracking, training, wrap
from ._harness import Report, header, progress, save, show

# module and rounds: enough for quartiles, few enough for ten minutes in all
BENCHMARKS: dict[str, tuple[Callable[..., list[Report]], int]] = {
    "penalty": (penalty.measure, 11),
    "growth": (growth.measure, 11),
    "tracking": (tracking.measure, 3),
    "router": (router.measure, 9),
    "experts": (experts.measure, 15),
    "wrap": (wrap.measure, 25),
    "delivery": (delivery.measure, 11),
    "launches": (launches.measure, 1),
    "training": (training.measure, 25),
    "startup": (startup.measure, 5),
    "cost": (cost.measure, 1),
}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    flags.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default all)")
    flags.add_argument("--repeats", type=int, help="rounds of each (default: of each its own)")
    flags.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run, not how fast")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    flags.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    flags.add_argument("--device", choices=["cpu", "cuda"], help="where (default: a GPU if there is one)")
    flags.add_argument("--data", type=Path, metavar="FOLDER", help="photos for the image example (default: random pixels)")
    arguments = flags.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        flags.error("--device cuda needs a GPU that torch sees, got none; leave it out, or install a CUDA build of torch")
    _harness.chosen = arguments.device
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        flags.error(f"names must be among {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    print(header())
    reports: list[Report] = []
    seconds: dict[str, float] = {}
    for name in arguments.names or BENCHMARKS:
        progress(name)
        measure, rounds = BENCHMARKS[name]
        if name == "training":
            measure = partial(measure, data=arguments.data)
        began = time.perf_counter()
        found = measure(arguments.repeats or (2 if arguments.quick else rounds), arguments.quick)
        seconds[name] = round(time.perf_counter() - began, 2)
        show(found)
        reports += found
        save(reports, arguments.json, arguments.markdown, seconds)  # after each: what is cut off later loses nothing
    print(", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()))


if __name__ == "__main__":
    main()
