"""A checkpoint as names, shapes and the means to read one tensor: what every format is turned into."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, not read yet.

    shape: as the file states it.
    dtype: as the file calls it.
    read: reads this tensor, and nothing else.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor] = field(repr=False)


@dataclass
class Checkpoint:
    """The tensors of a checkpoint by name, and its config.json where it has one.

    kind: the format, in words.
    """

    path: Path
    kind: str
    tensors: dict[str, Stored]
    config: dict[str, Any] = field(default_factory=dict)

    def says(self, *keys: str) -> Any:
        """The first of these settings that the config, or a part of it, has."""
        sources: list[Mapping[str, Any]] = [self.config]
        while sources:
            source = sources.pop(0)
            for key in keys:
                if source.get(key) is not None:
                    return source[key]
            sources += [value for value in source.values() if isinstance(value, Mapping)]
        return None


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def short(error: BaseException, limit: int = 160) -> str:
    """The first line of what another library had to say."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
