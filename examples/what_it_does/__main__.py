"""`python -m examples.what_it_does`"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from examples.shared.command import ExperimentError, finish, importing, parser, require


def main(arguments: list[str] | None = None) -> int:
    flags = parser("python -m examples.what_it_does", "One picture of what wrap_moe does.")
    flags.add_argument("--out", type=Path, default=Path("runs/what_it_does.png"), help="the picture (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=5, help="how many, a thin line and a dot each (default: %(default)s)")
    flags.add_argument("--steps", type=int, default=600, help="of training (default: %(default)s)")

    def work() -> str:
        given = flags.parse_args(arguments)
        for name in ("seeds", "steps"):
            require(getattr(given, name) >= 1, name, "at least 1", getattr(given, name))
        with importing(resumes=None):
            from . import picture  # only now: flags and their help need no torch

        _writable(given.out, picture.FORMATS)
        picture.made(given.out, given.seeds, given.steps)
        return f"picture: {given.out}"

    return finish(work, resumes=None)


def _writable(out: Path, formats: tuple[str, ...]) -> None:
    """Before the work: whether the picture can be written at its end."""
    require(out.suffix[1:].lower() in formats, "out", f"a file named .png, or as one of {', '.join(formats)}", out)
    require(not out.is_dir(), "out", "a file, not a folder", out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"--out must be in a folder that can be made, got {out}: {error}") from error
    require(os.access(out if out.exists() else out.parent, os.W_OK), "out", "a file that may be written", out)


if __name__ == "__main__":
    sys.exit(main())
