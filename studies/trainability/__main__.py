"""`python -m studies.trainability run` and `python -m studies.trainability page`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.shared.command import ExperimentError, finish, parser
from studies import saved
from studies.reproduction import protocol
from studies.reproduction.run import study

from . import page
from .results import RESULTS, gather

PROTOCOL = Path(__file__).with_name("study.toml")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser("python -m studies.trainability", "Which gates let the paper's network train: the runs, and their page.")
    commands = flags.add_subparsers(dest="command", required=True)
    running = commands.add_parser(
        "run",
        allow_abbrev=False,
        description="Do what is left of the protocol's runs and write results.json in --out. Started several times with the "
        "same --out, the processes share the runs. Stopped, the same command goes on.",
    )
    running.add_argument("--protocol", type=Path, default=PROTOCOL, help="default: %(default)s")
    running.add_argument("--out", type=Path, default=Path("runs/trainability"), help="results (default: %(default)s)")
    running.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains TEXT: 4-layers")
    showing = commands.add_parser("page", allow_abbrev=False, description="Make docs/trainability.md from saved results.")
    showing.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    showing.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation (default: %(default)s)")
    return flags.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    return finish(lambda: _run(given) if given.command == "run" else _page(given), resumes="")


def _run(given: argparse.Namespace) -> str:
    plan = protocol.read(given.protocol)
    missing = [name for name in ("settings", "data", "failed", "main", "failure") if name not in plan]
    if missing:
        raise ExperimentError(f"--protocol must have the sections of study.toml, got one without {', '.join(missing)}")
    study(plan, {}, given.out, ("failure",), given.only)
    path = given.out / "results.json"
    saved.write(gather(plan, given.out), path)
    return f"results: {path}"


def _page(given: argparse.Namespace) -> str:
    return "written: " + ", ".join(str(file) for file in page.write(saved.read(given.results), given.docs))


if __name__ == "__main__":
    sys.exit(main())
