"""The command line of an example: a flag for each field of its Config, where results go, what ends it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from .progress import console


class Checked(Protocol):
    """A Config: a dataclass that knows its rules."""

    def __init__(self, **fields: Any) -> None: ...

    def validate(self) -> None: ...


C = TypeVar("C", bound=Checked)


class ExperimentError(Exception):
    """Bad input or a failing disk: one sentence for the user, no traceback."""


class Options(NamedTuple):
    """Where the results go: no part of the experiment itself."""

    out: Path
    resume: bool
    overwrite: bool


RESUMES = "with --resume and without --overwrite, "


def finish(work: Callable[[], str | None], resumes: str = RESUMES) -> int:
    """Do the work and print its last line, if it has one. 0 done, 1 bad input or a failing disk, 130 stopped by Ctrl-C.
    `resumes`: what the same command needs to go on."""
    try:
        last = work()
    except (ExperimentError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(f"stopped; the same command, {resumes}goes on from here", markup=False, soft_wrap=True)
        return 130
    if last is not None:
        print(last)
    return 0


def example(
    arguments: list[str] | None,
    parse: Callable[[list[str] | None], tuple[Any, Options]],
    run: Callable[[Any, Options], dict[str, Any] | None],
    write: Callable[[dict[str, Any], Path], Any],
    draw: Callable[[dict[str, Any], Path], list[Path]],
) -> int:
    """From flags to pictures; the exit status as of `finish`. `run` gives None where another process writes."""

    def work() -> str | None:
        config, options = parse(arguments)
        results = run(config, options)
        if results is None:
            return None
        write(results, options.out)
        drawn = draw(results, options.out / "figures")
        return f"results: {options.out / 'results.json'}, tables.md; pictures: {', '.join(str(path) for path in drawn)}"

    return finish(work)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=description)  # --seed 7 must not mean --seeds 7


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of a Config: its default, its explanation, and what argparse needs beyond them."""
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"nargs": "+", **metadata})
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(
    flags: argparse.ArgumentParser, config: type[Any], without: tuple[str, ...] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """A flag for each field of a Config but those `without`, with its default but for `defaults`. One that is not given is
    not in what is parsed."""
    for item in dataclasses.fields(config):
        if item.name in without:
            continue
        options = dict(item.metadata)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        default = (defaults or {}).get(item.name, default)
        text = options.pop("help")
        if "(default:" not in text:
            text += f" (default: {_shown(default)})"
        name, text = "--" + item.name.replace("_", "-"), text.replace("%", "%%")
        kind = options.pop("type", type(default))
        if kind is bool:
            flags.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            flags.add_argument(name, default=argparse.SUPPRESS, help=text, type=kind, **options)


def add_place(flags: argparse.ArgumentParser, out: str) -> None:
    """--out, --resume, --overwrite."""
    flags.add_argument("--out", type=Path, default=Path(out), help="folder of the results (default: %(default)s)")
    again = flags.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --out first")


def settle(config: type[C], given: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> tuple[C, Options]:
    """The Config of the flags that were given, its rules checked, and where the results go."""
    where = Options(given.pop("out"), given.pop("resume"), given.pop("overwrite"))
    made = config(**{**(defaults or {}), **given})
    made.validate()
    return made, where


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """ExperimentError, in the words of the flag, unless the rule holds."""
    if not holds:
        raise ExperimentError(f"--{name.replace('_', '-')} must be {rule}, got {_shown(value)}")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
