"""`python -m studies.regularizers norm` and `python -m studies.regularizers energy`"""

from __future__ import annotations

import sys

from examples.shared.command import example

from . import figures, report, study
from .config import parse


def main(arguments: list[str] | None = None) -> int:
    return example(arguments, parse, study.run, report.write, figures.draw)


if __name__ == "__main__":
    sys.exit(main())
