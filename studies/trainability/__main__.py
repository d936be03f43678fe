"""`python -m studies.trainability run` and `python -m studies.trainability page`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.shared.command import finish, importing, parser, telling
from studies.reproduction import protocol

PROTOCOL, RESULTS = (Path(__file__).with_name(name) for name in ("study.toml", "results.json"))


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
    with importing(resumes=""):
        plan = protocol.read(given.protocol, ("failure",))
        from studies import saved  # only now: flags and their help need no torch
        from studies.reproduction.run import study

        from .results import gather
    study(plan, {}, given.out, ("failure",), given.only)
    path = given.out / "results.json"
    saved.write(gather(plan, given.out), path)
    return f"results: {path}"


def _page(given: argparse.Namespace) -> str:
    with importing(resumes=""):
        from studies import saved

        from . import page
    results = saved.read(given.results)
    with telling(f"--results must be a file that `run` wrote, got {given.results}"):
        files = page.write(results, given.docs)
    return "written: " + ", ".join(map(str, files))


if __name__ == "__main__":
    sys.exit(main())
