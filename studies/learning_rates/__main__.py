"""`python -m studies.learning_rates run`, `clipping` and `page`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from examples.shared.command import ExperimentError, finish, importing, parser
from studies.command import add_page, add_run, make_page

from . import protocol

RESULTS = Path(__file__).with_name("results.json")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser("python -m studies.learning_rates", "Learning rates and what holds the router: the runs, and their page.")
    commands = flags.add_subparsers(dest="command", required=True)
    running = add_run(commands, protocol.PROTOCOL, "runs/learning_rates")
    running.add_argument("--stages", nargs="+", default=protocol.STAGES, choices=protocol.STAGES, help="default: all")
    running.add_argument("--models", nargs="+", default=[], help="only these of the protocol's (default: all)")
    running.add_argument("--seeds", type=int, default=0, help="only so many test seeds (default: all)")
    running.add_argument("--saved", action="store_true", help="begin with the runs that are saved in the repository")
    asking = commands.add_parser(
        "clipping",
        allow_abbrev=False,
        description="Tell the penalty's part at low rates from the clipping's: twelve runs.",
    )
    asking.add_argument("--out", type=Path, default=Path("runs/learning_rates"), help="of the text (default: %(default)s)")
    add_page(commands, RESULTS, "docs/learning_rates.md")
    return flags.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    page = partial(make_page, "studies.learning_rates.page")
    does: dict[str, Callable[[argparse.Namespace], str]] = {"run": _run, "clipping": _clipping, "page": page}
    return finish(lambda: does[given.command](given), resumes="")


def _run(given: argparse.Namespace) -> str:
    with importing(resumes=""):
        plan = protocol.read(given.protocol)
        from . import saved, study  # only now: flags and their help need no torch
    for name in given.models:
        if name not in plan["models"]:
            raise ExperimentError(f"--models must be any of {', '.join(plan['models'])}, got {name}")
    if given.seeds < 0:
        raise ExperimentError(f"--seeds must be at least 0, got {given.seeds}")
    if given.saved:
        saved.unpack(saved.read(RESULTS), given.out)
    stages = tuple(stage for stage in protocol.STAGES if stage in given.stages)
    study.study(plan, given.out, stages, tuple(given.models), given.seeds)
    path = given.out / "results.json"
    saved.write(study.gather(plan, given.out), path)
    return f"results: {path}"


def _clipping(given: argparse.Namespace) -> str:
    with importing(resumes=""):
        from . import clipping
    return f"results: {clipping.run(protocol.read(), given.out)}"


if __name__ == "__main__":
    sys.exit(main())
