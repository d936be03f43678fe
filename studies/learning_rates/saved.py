"""The saved runs, and how a new folder begins with them."""

from __future__ import annotations

from pathlib import Path

from examples.shared.storage import write_json
from studies.queue import file_of
from studies.saved import Results, read, write

from .protocol import Run

__all__ = ["RESULTS", "Results", "read", "unpack", "write"]

RESULTS = Path(__file__).with_name("results.json")


def unpack(results: Results, out: Path) -> None:
    """The runs as files, so that a study goes on from what is saved."""
    for record in results["runs"]:
        file = file_of(out, Run(**{name: record[name] for name in Run._fields}))
        if not file.exists():
            write_json(file, record)
