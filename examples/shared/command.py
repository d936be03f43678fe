"""The command line of an example: a flag for each field of its Config, where results go, what ends it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

# nothing of torch here: flags and their help are there at once


class Checked(Protocol):
    """A Config: a dataclass that knows its rules."""

    def __init__(self, **fields: Any) -> None: ...

    def validate(self) -> None: ...


C = TypeVar("C", bound=Checked)


class ExperimentError(Exception):
    """Bad input or a failing disk: one sentence for the user, no traceback."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the results go: no part of the experiment itself."""

    out: Path
    resume: bool
    overwrite: bool
    # ends with the work: the lock on `out`
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack, compare=False, repr=False)


RESUMES = ", with --resume and without --overwrite,"


def finish(work: Callable[[], str | None], resumes: str | None = RESUMES) -> int:
    """Do the work and print its last line, if it has one. 0 done, 1 bad input, a failing disk or too little memory, 130 stopped
    by Ctrl-C. `resumes`: what the same command needs to go on; None: it cannot."""
    try:
        last = work()
    except (ExperimentError, OSError) as error:
        return _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _stopped(resumes)
    except (MemoryError, RuntimeError) as error:  # torch has a RuntimeError for each allocator
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        return _end(f"error: too little memory: {reason}; make the network, the images or the batches smaller", 1)
    if last is not None:
        print(last)
    return 0


_NO_MEMORY = "allocate memory|out of memory|not enough memory|calculation overflowed"


def _stopped(resumes: str | None) -> int:
    again = "nothing is kept" if resumes is None else f"the same command{resumes} goes on from here"
    return _end(f"stopped; {again}", 130)


def _end(sentence: str, status: int) -> int:
    print(sentence.replace("\n", " "), file=sys.stderr)
    return status


@contextlib.contextmanager
def importing(resumes: str | None = RESUMES) -> Iterator[None]:
    """Around slow imports, where nothing is at stake yet: Ctrl-C ends the process there and then. As an exception it could be
    taken by a library that does without what it was importing."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(*_: object) -> None:
        status = _stopped(resumes)
        sys.stderr.flush()
        os._exit(status)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def telling(sentence: str) -> Iterator[None]:
    """What is done here hangs on one input alone: whatever goes wrong is said of that one, in a sentence."""
    try:
        yield
    except (ExperimentError, OSError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        raise ExperimentError(f"{sentence} ({type(error).__name__}: {text})") from error


Parts = tuple[
    Callable[[Any, Options], dict[str, Any] | None],
    Callable[[dict[str, Any], Path], Any],
    Callable[[dict[str, Any], Path], list[Path]],
]


def example(
    arguments: list[str] | None, parse: Callable[[list[str] | None], tuple[Any, Options]], parts: Callable[[], Parts]
) -> int:
    """From flags to pictures; the exit status as of `finish`. `parts` imports, once the flags are known to be right, what runs
    (None where another process writes), what writes tables and what draws."""

    def work() -> str | None:
        with importing():
            config, options = parse(arguments)
            run, write, draw = parts()
        with options.held:
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


def check_kinds(config: type[Any], settings: Mapping[str, Any]) -> None:
    """ExperimentError unless settings that come from a file are fields of the Config, each of the kind that its flag takes."""
    known = {item.name: item for item in dataclasses.fields(config)}
    for name, value in settings.items():
        if name not in known:
            raise ExperimentError(f"{name} is no setting; there are {', '.join(known)}")
        item = known[name]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        kind = item.metadata.get("type", type(default))
        if value is None and default is None:
            continue
        if "nargs" in item.metadata:
            require(isinstance(value, list | tuple), name, "a list", value)
        for one in value if "nargs" in item.metadata else [value]:
            require(_is(one, kind), name, _KINDS.get(kind, f"a {kind.__name__}"), value)


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _is(value: Any, kind: Callable[[str], Any]) -> bool:
    """Whether the flag would give this value, typed."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    try:
        return bool(kind(str(value)) == value)
    except ValueError:
        return False


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
