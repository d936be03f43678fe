"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def check_target(path: str) -> Path:
    """A file that can be written, before any work is done.

    Raises:
        ValueError: it cannot.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"{path} cannot be written, it is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"{path} cannot be written, there is no folder {target.parent}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written, permission is denied")
    return target


def write_whole(target: Path, text: str) -> None:
    """Into a file beside it first, which then takes its place; on any interruption nothing is left.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error.strerror})") from None


def as_json(content: dict[str, Any]) -> str:
    """NaN and infinity, which JSON does not know, as null."""
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
