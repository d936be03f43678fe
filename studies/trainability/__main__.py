"""`python -m studies.trainability run` and `python -m studies.trainability page`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.shared.command import finish, importing, parser
from studies.command import add_page, add_photos, add_run, make_page, places
from studies.reproduction import protocol

STAGES = ("main", protocol.STAGE_OF_CONDITIONS)
PROTOCOL, RESULTS = (Path(__file__).with_name(name) for name in ("study.toml", "results.json"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser("python -m studies.trainability", "Which gates let the paper's network train: the runs, and their page.")
    commands = flags.add_subparsers(dest="command", required=True)
    running = add_run(commands, PROTOCOL, "runs/trainability")
    add_photos(running)
    running.add_argument("--only", default="", metavar="TEXT", help="only runs whose name contains TEXT: 4-layers")
    add_page(commands, RESULTS, "docs/trainability.md")
    return flags.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    return finish(lambda: _run(given) if given.command == "run" else make_page("studies.trainability.page", given), resumes="")


def _run(given: argparse.Namespace) -> str:
    where = places(given)
    with importing(resumes=""):
        plan = protocol.read(given.protocol, STAGES)
        from studies import saved  # only now: flags and their help need no torch
        from studies.reproduction.run import study

        from .results import gather
    study(plan, where, given.out, STAGES, given.only)
    path = given.out / "results.json"
    saved.write(gather(plan, given.out), path)
    return f"results: {path}"


if __name__ == "__main__":
    sys.exit(main())
