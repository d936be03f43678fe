"""`python -m examples.image_classification`"""

from __future__ import annotations

import sys

from examples.shared.command import example

from . import experiment, figures, report
from .config import parse


def main(arguments: list[str] | None = None) -> int:
    return example(arguments, parse, experiment.run, report.write, figures.draw)


if __name__ == "__main__":
    sys.exit(main())
