"""Files that are either the old version or the new one, never half of it, and that are read only as they were written: what is
damaged, changed or of another program gets a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .command import ExperimentError, telling


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ExperimentError(
            f"cannot write {path}: {error}; make room, or choose another --out; what was saved before is intact, and --resume "
            "goes on from it"
        ) from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


SEAL = "sha256"  # the key beside what it is the fingerprint of


def write_json(path: Path, value: dict[str, Any]) -> None:
    """NaN and inf, which JSON lacks, become null. The key sha256 is a fingerprint of the rest."""
    value = json.loads(json.dumps(_finite(value), allow_nan=False))  # with keys as they will be read
    text = json.dumps(value | {SEAL: fingerprint(value)}, indent=1, sort_keys=True) + "\n"
    write_text(path, text)


def read_json(path: Path) -> dict[str, Any]:
    with _readable(path):
        return _unsealed(json.loads(path.read_text(encoding="utf-8")))


def going_on(path: Path) -> AbstractContextManager[None]:
    """Around taking over what was read of a file."""
    return telling(
        f"cannot go on from {path}, which is of another network or of another version; delete that file, or begin anew with "
        "--overwrite"
    )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(state | {SEAL: fingerprint(state)}, temporary))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    with _readable(path):
        return _unsealed(torch.load(path, map_location=device, weights_only=True))


def fingerprint(value: Any) -> str:
    """Of what JSON or a checkpoint holds: numbers, text, tensors, and lists and mappings of them."""
    hashed = hashlib.sha256()
    _feed(hashed, value)
    return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        hashed.update(b"{")
        for key in sorted(value, key=repr):
            hashed.update(repr(key).encode())
            _feed(hashed, value[key])
        hashed.update(b"}")
    elif isinstance(value, list | tuple):
        hashed.update(b"[")
        for item in value:
            _feed(hashed, item)
        hashed.update(b"]")
    else:
        hashed.update(repr(value).encode() + b",")


def _unsealed(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.pop(SEAL, None) != fingerprint(value):
        raise ValueError("it is not as a run wrote it")
    return value


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No second process works on the folder meanwhile. It is free again when this one ends, however it does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise ExperimentError(f"cannot write {folder}: {error}; choose another --out") from error
    with handle:
        if not locked(handle.fileno()):
            raise ExperimentError(f"another process is at work on {folder}; wait for its end, or choose another --out")
        yield


def locked(descriptor: int) -> bool:
    """Whether this process has the file to itself now, until it closes it."""
    if os.name != "posix":  # without locks one process works alone
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged pickle can raise anything
        raise ExperimentError(
            f"cannot read {path}: {_reason(error)}; delete that file, or begin anew with --overwrite"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]  # of an empty file torch says nothing


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
