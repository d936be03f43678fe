"""`python -m studies.surgery`"""

from __future__ import annotations

import sys

from examples.shared.command import finish, importing

from .config import parse


def main(arguments: list[str] | None = None) -> int:
    def work() -> str:
        with importing():
            config, options = parse(arguments)
            from . import study  # only now: flags and their help need no torch

        with options.held:
            study.run(config, options)
        return f"results: {options.out / 'results.json'}, tables.md"

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())
