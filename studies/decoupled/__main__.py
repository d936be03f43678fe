"""`python -m studies.decoupled`"""

from __future__ import annotations

import sys
from pathlib import Path

from examples.shared.command import finish, importing, parser, require


def main(arguments: list[str] | None = None) -> int:
    return finish(lambda: _work(arguments))


def _work(arguments: list[str] | None) -> str:
    flags = parser(
        "python -m studies.decoupled", "The penalty in Adam's gradient against decoupled, at equal choice of strength."
    )
    flags.add_argument("--out", type=Path, default=Path("runs/decoupled"), help="folder of the results (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    flags.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    flags.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = flags.parse_args(arguments)
    for name in ("seeds", "steps"):
        require(getattr(given, name) >= 1, name, "at least 1", getattr(given, name))
    with importing():
        from . import study  # only now: flags and their help need no torch

    text = study.study(given.out, given.seeds, given.steps, given.resume)
    return f"{text}\nresults: {given.out / 'results.json'}, {given.out / 'tables.md'}"


if __name__ == "__main__":
    sys.exit(main())
