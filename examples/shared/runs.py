"""A folder of results: whose run it holds, with which versions it was made; and intervals over the seeds of a run."""

from __future__ import annotations

import math
import platform
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from spectral_router import __version__

from .command import ExperimentError, Options
from .progress import console
from .storage import alone, read_json, write_json

# all that runs leave in --out
NAMES = ("parts", "models", "figures", "tuning", "work", "logs", "results.json", "tables.md", "step_time.json", "config.json")
MANIFEST = "config.json"


def prepare(settings: dict[str, Any], options: Options, what: str = "images", source: str = "data") -> list[dict[str, str]]:
    """Make the output folder, or make sure that the run in it is the one to continue. Gives the versions that it was begun
    with and continued under, where they are others than now.

    `settings` holds all that the run depends on, by the names of the flags; `digest` among them is a fingerprint of the data,
    which `what` calls by its name and the setting `source` says the place of. No other process works on the folder until
    `options.held` is closed.
    """
    options.held.enter_context(alone(options.out))
    file, now = options.out / MANIFEST, versions()
    before = manifest(options.out)
    if options.overwrite and before is not None:
        delete(options.out, before["holds"])
        before = None
    if before is None:
        if found := [name for name in NAMES if (options.out / name).exists()]:
            raise ExperimentError(
                f"{options.out} holds {', '.join(found)}, which a run would write, and no {MANIFEST} says that a run of ours "
                "made it; choose another --out"
            )
        write_json(file, {"settings": settings, "holds": NAMES, "versions": [now]})
        return []
    if not options.resume:
        raise ExperimentError(f"{options.out} already holds a run; pass --resume, --overwrite, or another --out")
    _compare(settings, before["settings"], options.out, what, source)
    earlier = others(before["versions"], now)
    if earlier == before["versions"]:
        write_json(file, before | {"versions": [*earlier, now]})
    return earlier


def manifest(out: Path) -> dict[str, Any] | None:
    """What a run of ours wrote of itself into its folder; None where nothing is."""
    file = out / MANIFEST
    if not file.exists():
        return None
    try:
        return read_json(file)
    except ExperimentError as error:
        raise ExperimentError(
            f"{str(error).partition(';')[0]}; without it nothing in {out} is touched: choose another --out"
        ) from None


def delete(out: Path, names: list[str]) -> None:
    """The manifest last: a deletion that is cut short can be done again."""
    for path in sorted((out / name for name in names), key=lambda path: path.name == MANIFEST):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _compare(settings: dict[str, Any], before: dict[str, Any], out: Path, what: str, source: str) -> None:
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed == ["digest"]:
        raise ExperimentError(
            f"--resume needs the {what} that the run in {out} began with, got other {what} from {settings[source]}; "
            "bring the first back, or begin anew with --overwrite"
        )
    if changed:
        names = [name for name in changed if name != "digest"]
        flags = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {settings[name]}" for name in names)
        raise ExperimentError(f"--resume needs the settings that the run in {out} began with: {flags}")


def others(before: list[dict[str, str]], now: dict[str, str]) -> list[dict[str, str]]:
    """Those of the versions that a resumed run was made with before which are not those of now; each is told."""
    earlier = [one for one in before if one != now]
    for one in earlier:
        changed = ", ".join(f"{name} {value}, now {now.get(name)}" for name, value in one.items() if now.get(name) != value)
        text = f"part of this run was made with {changed}; its numbers may differ from those of an unbroken run"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return earlier


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package, torch, einops, numpy, and of further packages."""
    return {"python": platform.python_version(), "spectral-router": __version__} | {
        name: version(name) for name in ("torch", "einops", "numpy", *packages)
    }


def interval(values: list[float | None]) -> dict[str, Any]:
    """{mean, ci95, n}; ci95, the half-width of the 95 % interval (Student's t), is None for a single value, which has no spread
    to tell. None among the values, of a diverged run, makes it NaN."""
    n = len(values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < n:
        return {"mean": math.nan, "ci95": math.nan if n > 1 else None, "n": n}
    half = _quantile(n - 1) * stdev(known) / n**0.5 if n > 1 else None
    return {"mean": fmean(known), "ci95": half, "n": n}


@cache  # scipy takes a while for each, and all numbers of a run have the same seeds
def _quantile(degrees: int) -> float:
    """97.5 % of Student's t are below it."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
