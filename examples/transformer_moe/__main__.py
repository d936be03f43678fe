"""`python -m examples.transformer_moe`; the same under `torchrun` and `accelerate launch`, with -m."""

from __future__ import annotations

import sys

from examples.image_classification.config import ExperimentError
from examples.image_classification.progress import console

from . import figures, report, study
from .config import parse


def main(arguments: list[str] | None = None) -> int:
    """0 done, 1 bad input or a failing disk, 130 stopped by Ctrl-C."""
    try:
        config, options = parse(arguments)
        results = study.run(config, options)
        if results is None:  # another process writes
            return 0
        report.write(results, options.out)
        drawn = figures.draw(results, options.out / "figures")
    except ExperimentError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command with --resume goes on from here", markup=False)
        return 130
    print(f"results: {options.out / 'results.json'}, tables.md; pictures: {', '.join(str(path) for path in drawn)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
