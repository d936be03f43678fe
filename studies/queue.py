"""Runs as files: any number of processes side by side, each takes the next run that nobody has begun.

A run that is done is a file in OUT/parts. Claims end with their process, however that ends, so a killed study just goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.progress import Progress

from examples.shared.command import ExperimentError
from examples.shared.runs import others, versions
from examples.shared.storage import locked, read_json, write_json

WAIT = 3.0  # seconds between looks at what other processes have still to finish
Record = dict[str, Any]


class Named(Protocol):
    """A run."""

    @property
    def name(self) -> str:
        """What its file is called; unique."""


R = TypeVar("R", bound=Named)


def finish(wanted: Sequence[R], stage: str, out: Path, progress: Progress, do: Callable[[R], None]) -> None:
    """Until all runs are there: do those that nobody is at, also what a process that died has left. `do` writes the file."""
    task = progress.add_task(stage, total=len(wanted), note="")
    while missing := [one for one in wanted if not file_of(out, one).exists()]:
        idle = True
        for one in missing:
            with claim(out, one) as mine:
                if mine:
                    idle = False
                    progress.update(task, note=one.name)
                    do(one)
            progress.update(task, completed=sum(file_of(out, other).exists() for other in wanted))
        if idle:
            progress.update(task, note="waiting for other processes")
            time.sleep(WAIT)
    progress.remove_task(task)


def records(out: Path) -> list[Record]:
    """All that is saved, sorted by name."""
    return [read_json(file) for file in sorted((out / "parts").glob("*.json"))]


def file_of(out: Path, one: Named) -> Path:
    return out / "parts" / f"{one.name}.json"


def begin(out: Path, protocol: dict[str, Any]) -> None:
    """Make sure that the folder is this protocol's, and say if part of its runs was made with other versions."""
    if (out / "parts").exists() and not (out / "protocol.json").exists():
        raise ExperimentError(f"--out must be a folder of this study or a new one, got {out}, whose parts are of another")
    same(out / "protocol.json", protocol, "--out must be of one protocol")
    made_with = [record["versions"] for record in records(out) if "versions" in record]
    others([one for index, one in enumerate(made_with) if one not in made_with[:index]], versions())


def same(file: Path, value: dict[str, Any], rule: str) -> None:
    """Keep `value` in the file, or make sure that it is what the file has."""
    if not file.exists():
        write_json(file, value)
    elif read_json(file) != value:
        raise ExperimentError(f"{rule}, got another one than in {file}; choose another --out, or delete that folder")


@contextlib.contextmanager
def claim(out: Path, one: Named) -> Iterator[bool]:
    """Whether this process is the one to do the run. The claim ends with the process, however that ends."""
    if file_of(out, one).exists():
        yield False
        return
    lock = out / "locks" / one.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        yield locked(handle.fileno()) and not file_of(out, one).exists()
