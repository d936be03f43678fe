"""`python -m studies.pages`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from examples.shared.command import finish, parser
from examples.shared.storage import write_atomically, write_text

from . import cnn_experts, comparison, language_model, regularizers
from .tables import Tables, folded, read


class Page(NamedTuple):
    """What is made of one file of tables."""

    verdict: Callable[[Tables], str]
    picture: Callable[[Tables], Figure]
    untitled: tuple[str, ...] = ()


PAGES = {
    "comparison": Page(comparison.verdict, comparison.picture, comparison.TITLES),
    "cnn_experts": Page(cnn_experts.verdict, cnn_experts.picture),
    "language_model": Page(language_model.training, language_model.picture),
    "language_model_finetune": Page(language_model.finetuning, language_model.picture_finetuning),
    "regularizers_norm": Page(regularizers.norm, regularizers.picture_norm),
    "regularizers_energy": Page(regularizers.energy, regularizers.picture_energy),
}


def main(arguments: list[str] | None = None) -> int:
    flags = parser("python -m studies.pages", "Make verdicts and pictures of the tables that runs left in the documentation.")
    flags.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the documentation (default: %(default)s)")
    given = flags.parse_args(arguments)
    return finish(lambda: _write(given), resumes="")


def _write(given: argparse.Namespace) -> str:
    files: list[Path] = []
    for name, page in PAGES.items():
        source = given.docs / f"{name}_tables.md"
        tables = read(source)
        texts = {source: folded(tables, page.untitled), given.docs / f"{name}_verdict.md": page.verdict(tables)}
        for path, text in texts.items():
            write_text(path, text)
        figure = page.picture(tables)
        picture = given.docs / "images" / f"{name}.png"
        write_atomically(picture, partial(figure.savefig, format="png", dpi=130))
        plt.close(figure)
        files += [*texts, picture]
    return "written: " + ", ".join(str(file) for file in files)


if __name__ == "__main__":
    sys.exit(main())
