"""Folders that others fill, file by file: whether all is there, to the byte, that was there when it was done."""

from __future__ import annotations

import hashlib
from pathlib import Path

from examples.shared.command import ExperimentError
from examples.shared.storage import read_json, write_json

# comes last, and lists the others
WHOLE = "whole"


def seal(folder: Path) -> None:
    write_json(folder / WHOLE, {"files": _files(folder)})


def is_whole(folder: Path) -> bool:
    try:
        return bool(read_json(folder / WHOLE)["files"] == _files(folder))
    except (ExperimentError, OSError):
        return False


def _files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != WHOLE:
            with path.open("rb") as handle:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found
