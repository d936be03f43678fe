"""Pictures as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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


def plain(name: str) -> str:
    """A class name as text: matplotlib reads $ as mathematics, and leaves labels with a leading underscore out."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")
