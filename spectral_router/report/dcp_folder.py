"""Folders of `torch.distributed.checkpoint`: the table in `.metadata`, then the pieces of one tensor from the ranks' files."""

from __future__ import annotations

import io
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import Stored, short

# The table is a pickle. These, and nothing else, may be made of it: no function that does anything is among them.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "builtins": {"set"},
}


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the table asks for {module}.{name}, which is not made here")


def dcp_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by name.

    Raises:
        ValueError: the table cannot be read, or is not one.
    """
    table = folder / ".metadata"
    try:
        with table.open("rb") as file:
            metadata: Any = _Table(file).load()
        entries = dict(metadata.state_dict_metadata)
        infos: dict[tuple[str, tuple[int, ...]], Any] = {}
        for index, info in dict(metadata.storage_data).items():
            infos[index.fqn, tuple(index.offset or ())] = info
        tensors = {}
        for name, entry in entries.items():
            if not hasattr(entry, "chunks"):
                continue
            shape = tuple(int(side) for side in entry.size)
            chunks = [(tuple(c.offsets), tuple(c.sizes), infos.get((name, tuple(c.offsets)))) for c in entry.chunks]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[str(name)] = Stored(shape, dtype, partial(_read, folder, str(name), shape, chunks))
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{table} is no table of a distributed checkpoint, or is damaged ({short(error)})") from None
    return tensors


def _read(folder: Path, name: str, shape: tuple[int, ...], chunks: list[tuple[Any, Any, Any]]) -> Tensor:
    whole: Tensor | None = None
    filled = 0
    try:
        for offsets, sizes, info in chunks:
            if info is None:
                raise ValueError("the table has no place for one of its pieces")
            path = folder / info.relative_path
            if path.resolve().parent != folder.resolve() or not path.is_file():
                raise ValueError(f"there is no file {info.relative_path}")
            with path.open("rb") as file:
                file.seek(info.offset)
                raw = file.read(info.length)
            piece = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            if not isinstance(piece, Tensor) or tuple(piece.shape) != sizes:
                raise ValueError("a piece is not of the shape that the table states")
            if sizes == shape:
                return piece
            whole = torch.zeros(shape, dtype=piece.dtype) if whole is None else whole
            places = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
            whole[places] = piece
            filled += piece.numel()
    except Exception as error:
        raise ValueError(f"{name!r} in {folder} cannot be read ({short(error)}); save the checkpoint again") from None
    if whole is None or filled < math.prod(shape):
        raise ValueError(f"{name!r} in {folder} is not complete: {filled} of {math.prod(shape)} entries are there")
    return whole


def is_dcp(folder: Path) -> bool:
    return (folder / ".metadata").is_file()
