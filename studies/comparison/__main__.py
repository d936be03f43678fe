"""`python -m studies.comparison`"""

from __future__ import annotations

import sys

from examples.image_classification.config import Config
from examples.shared.command import ExperimentError, Options, add_flags, add_place, finish, importing, parser, require, settle

from .arms import ARMS

# what an arm sets itself
SET_BY_ARMS = ("routers", "penalty", "balance", "alpha", "beta", "bound", "bias_rate", "oneshot_lr", "relative")
DEFAULTS = {"layers": 4, "experts": 4, "seeds": 5}


def parse(arguments: list[str] | None = None) -> tuple[Config, Options, list[str], int]:
    flags = parser(
        "python -m studies.comparison",
        "Train the network of examples.image_classification with every penalty, balance loss and controller of the library, "
        "each at a strength chosen on validation images, and leave one table and one picture in --out.",
    )
    add_flags(flags, Config, SET_BY_ARMS, DEFAULTS)
    add_place(flags, "runs/comparison")
    flags.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"any of: {'; '.join(ARMS)} (default: all)")
    flags.add_argument("--tuning-seeds", type=int, default=2, help="seeds for choosing the strengths (default: %(default)s)")
    given = vars(flags.parse_args(arguments))
    names, tuning_seeds = given.pop("arms"), given.pop("tuning_seeds")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ExperimentError(f"--arms must be any of {'; '.join(ARMS)}, got {'; '.join(unknown)}")
    require(tuning_seeds >= 1, "tuning_seeds", "at least 1", tuning_seeds)
    config, options = settle(Config, given, DEFAULTS)
    return config, options, list(dict.fromkeys(names)), tuning_seeds


def main(arguments: list[str] | None = None) -> int:
    return finish(lambda: _work(arguments))


def _work(arguments: list[str] | None) -> str:
    with importing():
        config, options, names, tuning_seeds = parse(arguments)
        from . import report, run  # only now: flags and their help need no torch

    with options.held:
        results = run.run(config, options, names, tuning_seeds)
        files = report.write(results, options.out)
    return f"results: {options.out / 'results.json'}; {', '.join(str(path) for path in files)}"


if __name__ == "__main__":
    sys.exit(main())
