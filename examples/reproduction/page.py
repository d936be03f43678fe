"""docs/reproduction_tables.md, whose named sections docs/reproduction.md takes in, and the pictures: all that saved results say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, Any]


def write(results: Results, docs: Path) -> list[Path]:
    """Make tables and pictures from saved results; return the files."""
    raise NotImplementedError
