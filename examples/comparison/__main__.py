"""`python -m examples.comparison`"""

from __future__ import annotations

import sys

from examples.image_classification.config import Config, ExperimentError, Options, parser, settle
from examples.image_classification.progress import console

from . import report, run
from .arms import ARMS

# what an arm sets itself
SET_BY_ARMS = ("routers", "penalty", "balance", "alpha", "beta", "bound", "bias_rate", "oneshot_lr", "relative")
DEFAULTS = {"layers": 4, "experts": 4, "seeds": 5}


def parse(arguments: list[str] | None = None) -> tuple[Config, Options, list[str], int]:
    flags = parser(
        "python -m examples.comparison",
        "Train the network of examples.image_classification with every penalty, balance loss and controller of the library, "
        "each at a strength chosen on validation images, and leave one table and one picture in --out.",
        "runs/comparison",
        without=SET_BY_ARMS,
        **DEFAULTS,
    )
    flags.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"any of: {'; '.join(ARMS)} (default: all)")
    flags.add_argument("--tuning-seeds", type=int, default=2, help="seeds for choosing the strengths (default: %(default)s)")
    given = vars(flags.parse_args(arguments))
    names, tuning_seeds = given.pop("arms"), given.pop("tuning_seeds")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ExperimentError(f"--arms must be any of {'; '.join(ARMS)}, got {'; '.join(unknown)}")
    if tuning_seeds < 1:
        raise ExperimentError(f"--tuning-seeds must be at least 1, got {tuning_seeds}")
    config, options = settle(given, **DEFAULTS)
    return config, options, list(dict.fromkeys(names)), tuning_seeds


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 bad input or a failing disk, 130 stopped by Ctrl-C."""
    try:
        config, options, names, tuning_seeds = parse(arguments)
        results = run.run(config, options, names, tuning_seeds)
        files = report.write(results, options.out)
    except ExperimentError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command with --resume goes on from here", markup=False)
        return 130
    print(f"results: {options.out / 'results.json'}; {', '.join(str(path) for path in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
