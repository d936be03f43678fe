"""Where the text comes from: documents by domain, in an order that depends on their names and contents alone."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.shared.command import ExperimentError

from .config import Config

# a document counts up to here, so that no domain is one file
LONGEST = 16384
# of a hub data set, documents are read until the text is so many times what one domain may hold
HUB_DOMAINS = 16


class Document(NamedTuple):
    name: str
    text: str


def documents(config: Config) -> dict[str, Iterable[Document]]:
    """The documents of each domain; nothing is chosen yet."""
    path = Path(config.dataset)
    if config.dataset == "embedded":
        return dict(embedded())
    if path.is_file():
        return {path.stem: _read([path], path.parent, 2 * config.domain_bytes)}
    if path.is_dir():
        folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
        return {folder.name: _read(_files(folder), folder) for folder in folders or [path]}
    return _hub(config)


@functools.cache  # thousands of small files, 40 MB of text: read once a process
def embedded() -> dict[str, tuple[Document, ...]]:
    """What a Python installation with torch always carries, in four kinds."""
    library = Path(sysconfig.get_path("stdlib"))
    headers = Path(torch.__file__).parent / "include"
    found = {
        "headers": _read(_files(headers, ".h"), headers),
        "python": _read((file for file in _files(library, ".py") if "site-packages" not in file.parts), library),
        "reference": _reference(),
        "packages": _packages(),
    }
    return {name: tuple(part) for name, part in found.items()}


def _reference() -> Iterator[Document]:
    """The language reference, as `help()` shows it: a document a topic."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(name, text)


def _packages() -> Iterator[Document]:
    """Descriptions and licences of what is installed beside torch; `sys.path` may hold more once a program has run a while."""
    for distribution in metadata.distributions(path=[str(Path(torch.__file__).parents[1])]):
        for file in distribution.files or []:
            inside = next((part for part in file.parts if part.endswith(".dist-info")), None)
            if inside and (file.name == "METADATA" or file.name.lower().startswith(("licen", "copying", "notice", "authors"))):
                yield from _read([Path(str(file.locate()))], None)


def _files(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file() and not file.name.startswith("."))


def _read(files: Iterable[Path], root: Path | None, longest: int = LONGEST) -> Iterator[Document]:
    """What is not UTF-8, or cannot be read, is no text."""
    for file in files:
        try:
            with file.open(encoding="utf-8") as handle:
                text = handle.read(longest)
        except (OSError, UnicodeDecodeError):
            continue
        yield Document("/".join(file.parts[-3:]) if root is None else file.relative_to(root).as_posix(), text)


def _hub(config: Config) -> dict[str, Iterable[Document]]:
    name = config.dataset
    try:
        from datasets import load_dataset
    except ImportError:
        raise ExperimentError(
            f"--dataset {name} is no file and no folder, and a hub data set needs `pip install datasets`"
        ) from None
    try:
        rows: Iterable[dict[str, Any]] = load_dataset(name, split="train", streaming=True)
        found: dict[str, list[Document]] = {}
        size = 0
        for number, row in enumerate(rows):
            domain = name if config.domain_column is None else str(row[config.domain_column])
            text = str(row[config.text_column])[:LONGEST]
            found.setdefault(domain, []).append(Document(str(number), text))
            size += len(text)
            if size > HUB_DOMAINS * config.domain_bytes:
                break
    except KeyError as error:
        raise ExperimentError(
            f"{name} has no column {error}; name its columns with --text-column and --domain-column"
        ) from None
    except Exception as error:  # the library raises a kind of its own for each way to fail
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExperimentError(
            f"--dataset {name} is no file and no folder, and no hub data set that can be read: {reason}"
        ) from None
    return dict(found)
