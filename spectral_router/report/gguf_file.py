"""GGUF, the format of llama.cpp, through the `gguf` package; quantised tensors are dequantised by it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import Stored, short


def gguf_in(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Every tensor of a file by name, and what its head says of experts, in the words of a config.json.

    Raises:
        ValueError: the file cannot be read.
        ModuleNotFoundError: the `gguf` package is missing.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModuleNotFoundError('reading GGUF needs the gguf package; pip install "spectral-router[gguf]"') from None
    try:
        reader: Any = GGUFReader(path)
        tensors = {}
        for entry in reader.tensors:
            shape = tuple(int(side) for side in reversed(entry.shape))  # the file states the fastest dimension first
            tensors[str(entry.name)] = Stored(shape, str(entry.tensor_type.name), partial(_read, path, entry, shape))
        config: dict[str, Any] = {}
        for key, field in reader.fields.items():
            if key.endswith((".expert_count", ".expert_used_count")) or key == "general.architecture":
                config[key.rpartition(".")[2]] = field.contents()
    except Exception as error:  # numpy's and struct's own, of a damaged file
        raise ValueError(f"{path} is no GGUF file, or is damaged ({short(error)})") from None
    names = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok", "architecture": "gguf_architecture"}
    return tensors, {names[key]: value for key, value in config.items()}


def _read(path: Path, entry: Any, shape: tuple[int, ...]) -> Tensor:
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(shape)
    except Exception as error:
        raise ValueError(f"{entry.name!r} in {path} cannot be read as {entry.tensor_type.name} ({short(error)})") from None
