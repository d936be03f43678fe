"""`python -m examples.transformer_moe`; the same under `torchrun` and `accelerate launch`, with -m."""

from __future__ import annotations

import sys

from examples.shared.command import Parts, example

from .config import parse


def _parts() -> Parts:
    from . import figures, report, study

    return study.run, report.write, figures.draw


def main(arguments: list[str] | None = None) -> int:
    return example(arguments, parse, _parts)


if __name__ == "__main__":
    sys.exit(main())
