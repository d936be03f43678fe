"""Pictures as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .storage import write_atomically


def save(figures: Mapping[str, Callable[[dict[str, Any]], Figure]], results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every figure of the results into `folder`, by name; return the files."""
    drawn = []
    for name, make in figures.items():
        figure = make(results)
        path = folder / f"{name}.png"
        write_atomically(path, partial(figure.savefig, format="png", dpi=130))
        plt.close(figure)
        drawn.append(path)
    return drawn


def lanes(values: Sequence[float], height: float = 0.3) -> np.ndarray[Any, Any]:
    """Offsets (n,), at most half of `height` to each side, that keep dots at (nearly) equal values from hiding each other."""
    order = np.argsort(np.array(values, dtype=float), kind="stable")
    offsets = np.empty(len(values))
    offsets[order] = height * ((np.arange(len(values)) * 2 % 5) / 4 - 0.5)  # neighbours are two lanes of five apart
    return offsets


def plain(name: str) -> str:
    """A class name as text: matplotlib reads $ as mathematics, and leaves labels with a leading underscore out."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")
