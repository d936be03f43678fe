"""`python -m studies.reproduction run` and `python -m studies.reproduction page`"""

from __future__ import annotations

import argparse
import sys

from examples.shared.command import finish, importing, parser
from studies.command import add_page, add_photos, add_run, make_page, places

from . import protocol


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser("python -m studies.reproduction", "The reproduction study: its runs, and the page that shows them.")
    commands = flags.add_subparsers(dest="command", required=True)
    running = add_run(commands, protocol.PROTOCOL, "runs/reproduction")
    add_photos(running)
    running.add_argument("--stages", nargs="+", default=protocol.STAGES, choices=protocol.STAGES, help="default: all")
    running.add_argument(
        "--only", default="", metavar="TEXT", help="only runs whose name contains TEXT: digits-2x2.spectral.seed0"
    )
    add_page(commands, protocol.RESULTS, "the tables and pictures of docs/reproduction.md")
    return flags.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    return finish(lambda: _run(given) if given.command == "run" else make_page("studies.reproduction.page", given), resumes="")


def _run(given: argparse.Namespace) -> str:
    where = places(given)
    with importing(resumes=""):
        plan = protocol.read(given.protocol)
        from studies.queue import records  # only now: flags and their help need no torch

        from . import run, saved

    stages = tuple(stage for stage in protocol.STAGES if stage in given.stages)
    run.study(plan, where, given.out, stages, given.only)
    path = given.out / "results.json"
    saved.write(saved.gather(plan, records(given.out)), path)
    return f"results: {path}"


if __name__ == "__main__":
    sys.exit(main())
