"""safetensors: a header of names, shapes and places, then bytes. Read by hand, so that no byte of an expert is touched."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import Stored, short

_HEADER_LIMIT = 100_000_000  # that of the format
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_in(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by name.

    Raises:
        ValueError: the file is not of this format, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"{path} is no safetensors file: it has {size} bytes and states a header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("the header is no table")
        header.pop("__metadata__", None)
        places = {name: _place(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header cannot be read ({short(error)})") from None
    start = 8 + length
    for name, (_, _, begin, end) in places.items():
        if not 0 <= begin <= end or start + end > size:
            raise ValueError(
                f"{path} is truncated or damaged: {name!r} is to end at byte {start + end}, the file has {size}; "
                "download or save it again"
            )
    return {
        name: Stored(shape, dtype, partial(_read, path, name, shape, dtype, start + begin, end - begin))
        for name, (shape, dtype, begin, end) in places.items()
    }


def _place(entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or not isinstance(entry["dtype"], str):
        raise TypeError("a shape or a place is no list of whole numbers")
    return shape, entry["dtype"], begin, end


def _read(path: Path, name: str, shape: tuple[int, ...], dtype: str, begin: int, length: int) -> Tensor:
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise ValueError(f"{name!r} in {path} is of dtype {dtype}, which is not known here")
    if math.prod(shape) * kind.itemsize != length:
        raise ValueError(f"{path} is damaged: {name!r} of shape {shape} and dtype {dtype} cannot take {length} bytes")
    if not length:
        return torch.empty(shape, dtype=kind)
    with path.open("rb") as file:
        file.seek(begin)
        data = bytearray(file.read(length))
    return torch.frombuffer(data, dtype=torch.uint8).view(kind).reshape(shape)
