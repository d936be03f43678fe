"""A folder of results: whose run it holds, with which versions it was made; and intervals over the seeds of a run."""

from __future__ import annotations

import math
import platform
import shutil
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any

from spectral_router import __version__

from .command import ExperimentError, Options
from .storage import read_json, write_json

FOLDERS = ("parts", "models", "figures", "tuning", "work", "logs")
FILES = ("results.json", "tables.md", "config.json", "step_time.json")


def prepare(settings: dict[str, Any], options: Options, what: str = "images", source: str = "data") -> None:
    """Make the output folder, or make sure that the run in it is the one to continue.

    `settings` holds all that the run depends on, by the names of the flags; `digest` among them is a fingerprint of the data,
    which `what` calls by its name and the setting `source` says the place of.
    """
    file = options.out / "config.json"
    if options.overwrite:
        for name in FOLDERS:
            shutil.rmtree(options.out / name, ignore_errors=True)
        for name in FILES:
            (options.out / name).unlink(missing_ok=True)
    if not file.exists() and not (options.out / "parts").exists():
        write_json(file, settings)
        return
    if not options.resume:
        raise ExperimentError(f"{options.out} already holds a run; pass --resume, --overwrite, or another --out")
    before = read_json(file)
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed == ["digest"]:
        raise ExperimentError(
            f"--resume needs the {what} that the run in {options.out} began with, got other {what} from {settings[source]}; "
            "bring the first back, or begin anew with --overwrite"
        )
    if changed:
        names = [name for name in changed if name != "digest"]
        flags = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {settings[name]}" for name in names)
        raise ExperimentError(f"--resume needs the settings that the run in {options.out} began with: {flags}")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package, torch, einops, numpy, and of further packages."""
    return {"python": platform.python_version(), "spectral-router": __version__} | {
        name: version(name) for name in ("torch", "einops", "numpy", *packages)
    }


def interval(values: list[float | None]) -> dict[str, Any]:
    """{mean, ci95, n}; ci95, the half-width of the 95 % interval (Student's t), is None for a single value, which has no spread
    to tell. None among the values, of a diverged run, makes it NaN."""
    from scipy.stats import t

    n = len(values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < n:
        return {"mean": math.nan, "ci95": math.nan if n > 1 else None, "n": n}
    half = float(t.ppf(0.975, n - 1)) * stdev(known) / n**0.5 if n > 1 else None
    return {"mean": fmean(known), "ci95": half, "n": n}
