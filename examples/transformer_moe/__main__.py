"""`python -m examples.transformer_moe`; the same under `torchrun` and `accelerate launch`, with -m."""

from __future__ import annotations

import sys

from examples.shared.command import finish

from . import figures, report, study
from .config import parse


def main(arguments: list[str] | None = None) -> int:
    return finish(lambda: _work(arguments))


def _work(arguments: list[str] | None) -> str | None:
    config, options = parse(arguments)
    results = study.run(config, options)
    if results is None:  # another process writes
        return None
    report.write(results, options.out)
    drawn = figures.draw(results, options.out / "figures")
    return f"results: {options.out / 'results.json'}, tables.md; pictures: {', '.join(str(path) for path in drawn)}"


if __name__ == "__main__":
    sys.exit(main())
