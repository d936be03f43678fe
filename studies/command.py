"""What the studies that share their runs have in common on the command line: the flags of `run` and `page`, and the page."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from examples.shared.command import ExperimentError, importing, telling

# nothing of torch here: flags and their help are there at once


def add_run(commands: Any, protocol: Path, out: str) -> argparse.ArgumentParser:
    running: argparse.ArgumentParser = commands.add_parser(
        "run",
        allow_abbrev=False,
        description="Do what is left of the protocol's runs and write results.json in --out. Started several times with the "
        "same --out, the processes share the runs. Stopped, the same command goes on.",
    )
    running.add_argument("--protocol", type=Path, default=protocol, help="default: %(default)s")
    running.add_argument("--out", type=Path, default=Path(out), help="results (default: %(default)s)")
    return running


def add_photos(running: argparse.ArgumentParser) -> None:
    running.add_argument("--photos", type=Path, help="folder with subfolders car, cat, elephant, face; without: digits only")


def places(given: argparse.Namespace) -> dict[str, str]:
    """Where the data are that a protocol only names."""
    if given.photos is None:
        return {}
    if not given.photos.is_dir():
        raise ExperimentError(f"--photos must be a folder with one subfolder of images a class, got {given.photos}")
    return {"photos": str(given.photos)}


def add_page(commands: Any, results: Path, page: str) -> None:
    showing = commands.add_parser("page", allow_abbrev=False, description=f"Make {page} from saved results.")
    showing.add_argument("--results", type=Path, default=results, help="default: %(default)s")
    showing.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation (default: %(default)s)")


def make_page(module: str, given: argparse.Namespace) -> str:
    """Let `write(results, docs)` of the module make its files; the last line of the command."""
    with importing(resumes=""):
        from studies import saved

        page = import_module(module)
    results = saved.read(given.results)
    with telling(f"--results must be a file that `run` wrote, got {given.results}"):
        files = page.write(results, given.docs)
    return "written: " + ", ".join(map(str, files))
