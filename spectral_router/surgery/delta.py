"""What an update has changed, as a safetensors file: written, applied and taken back to the bit."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._sharding import whole
from .part import Index, Part, where

_FORMAT = "spectral-router delta 1"


@dataclass(frozen=True, eq=False)
class Entry:
    """A slice that may change: of which parameter of the model, and the digest of its bits before."""

    name: str
    part: Part
    before: str

    @property
    def key(self) -> str:
        return _key(self.name, self.part.index)

    def now(self) -> Tensor:
        tensor = whole(self.part.parameter.detach())
        return tensor if self.part.index is None else tensor[self.part.index]


def entry(name: str, part: Part) -> Entry:
    made = Entry(name, part, "")
    return Entry(name, part, digest(made.now()))


def digest(tensor: Tensor) -> str:
    """Of the bits of a tensor."""
    data = tensor.detach().cpu().contiguous()
    size = data.numel() * data.element_size()
    bits = (ctypes.c_ubyte * size).from_address(data.data_ptr()) if size else b""
    return hashlib.blake2b(bits, digest_size=16).hexdigest()


def write(file: str | Path, entries: Sequence[Entry], about: Any) -> int:
    """Write the entries that have changed; returns how many numbers those are."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    places = {}
    for one in entries:
        now = one.now()
        if one.key not in tensors and digest(now) != one.before:
            tensors[one.key] = now.cpu().clone(memory_format=torch.contiguous_format)
            index = one.part.index
            cuts = None if index is None else [[cut.start, cut.stop, cut.step] for cut in index]
            places[one.key] = {"parameter": one.name, "index": cuts, "before": one.before}
    save_file(tensors, file, {"format": _FORMAT, "places": json.dumps(places), "path": json.dumps(about)})
    return sum(tensor.numel() for tensor in tensors.values())


class Change:
    """One slice of a model, its bits before and after."""

    def __init__(self, parameter: nn.Parameter, index: Index | None, after: Tensor) -> None:
        self.part = Part(parameter, index)
        self.after = after
        self.before = self.part.tensor.detach().cpu().clone()

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        self.part.tensor.copy_(values)


class Delta:
    """A delta that is applied to a model. `remove()` takes it back, to the bit; so does the end of a `with`."""

    def __init__(self, changes: list[Change], path: Any) -> None:
        self.path = path
        self._changes = changes
        self._applied = True
        for change in changes:
            change.put(change.after)

    @property
    def numel(self) -> int:
        """How many numbers it changes."""
        return sum(change.after.numel() for change in self._changes)

    def remove(self) -> None:
        """Put the values from before back. Safe to call twice.

        Raises:
            RuntimeError: the model has been changed here since, so that removing would undo more than the delta.
        """
        if not self._applied:
            return
        if any(digest(change.part.tensor) != digest(change.after) for change in self._changes):
            raise RuntimeError(
                "the delta cannot be removed: what it changed has been changed again since; remove deltas in the reverse order "
                "of their loading, and before further training"
            )
        for change in self._changes:
            change.put(change.before)
        self._applied = False

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def load_delta(model: nn.Module, file: str | Path, *, strict: bool = True) -> Delta:
    """Apply a delta that `ExpertPath.save_delta` wrote to a model, in place.

    Args:
        model: of the same architecture, whole (before sharding), in the same dtype.
        strict: the slices must be, to the bit, what they were when the update began. False puts the update's values in
            their place whatever they are.

    Returns:
        `Delta`: `remove()` puts back what was there, to the bit; also a context manager.

    Raises:
        ValueError: the file is no delta, or of another model: a parameter is missing, of another shape or dtype, or (strict)
            has other values.
    """
    from safetensors import SafetensorError, safe_open

    root = getattr(model, "model", model) if hasattr(model, "gates") and hasattr(model, "model") else model
    parameters = dict(root.named_parameters(remove_duplicate=False))
    changes = []
    try:
        with safe_open(file, framework="pt") as source:
            about = source.metadata() or {}
            tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no delta as ExpertPath.save_delta writes it: {error}") from error
    if about.get("format") != _FORMAT:
        raise ValueError(f"{file} is no delta as ExpertPath.save_delta writes it: its format is {about.get('format')!r}")
    for key, place in json.loads(about["places"]).items():
        parameter = parameters.get(place["parameter"])
        if parameter is None:
            raise ValueError(f"the delta {file} is of another model: this one has no parameter {place['parameter']}")
        index = None if place["index"] is None else tuple(slice(*cut) for cut in place["index"])
        change = Change(parameter, index, tensors[key])
        if change.before.shape != change.after.shape or change.before.dtype != change.after.dtype:
            raise ValueError(
                f"the delta {file} is of another model: {key} is {_kind(change.before)} here and {_kind(change.after)} there; "
                "load it into a model of the same architecture and dtype"
            )
        if strict and digest(change.before) != place["before"]:
            raise ValueError(
                f"the delta {file} was made from other values of {key} than the model has; load the weights that the update "
                "began with, or pass strict=False to put its values there all the same"
            )
        changes.append(change)
    return Delta(changes, json.loads(about["path"]))


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _key(name: str, index: Index | None) -> str:
    return name if index is None else f"{name}{where(index)}"
