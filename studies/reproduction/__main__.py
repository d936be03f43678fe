"""`python -m studies.reproduction run` and `python -m studies.reproduction page`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.shared.command import ExperimentError, finish, importing, parser
from studies.command import add_page, add_run, make_page

from . import protocol


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    flags = parser("python -m studies.reproduction", "The reproduction study: its runs, and the page that shows them.")
    commands = flags.add_subparsers(dest="command", required=True)
    running = add_run(commands, protocol.PROTOCOL, "runs/reproduction")
    running.add_argument("--photos", type=Path, help="folder with subfolders car, cat, elephant, face; without: digits only")
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
    if given.photos is not None and not given.photos.is_dir():
        raise ExperimentError(f"--photos must be a folder with one subfolder of images a class, got {given.photos}")
    with importing(resumes=""):
        plan = protocol.read(given.protocol)
        from studies.queue import records  # only now: flags and their help need no torch

        from . import run, saved

    places = {"photos": str(given.photos)} if given.photos else {}
    stages = tuple(stage for stage in protocol.STAGES if stage in given.stages)
    run.study(plan, places, given.out, stages, given.only)
    path = given.out / "results.json"
    saved.write(saved.gather(plan, records(given.out)), path)
    return f"results: {path}"


if __name__ == "__main__":
    sys.exit(main())
