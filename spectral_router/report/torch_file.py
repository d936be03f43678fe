"""Files of `torch.save`: only tensors and plain containers are loaded, and the bytes of a tensor when it is looked at."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import Stored, short

# where trainers keep the model's part
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")


def torch_file_in(path: Path) -> dict[str, Stored]:
    """Every tensor of the model in a file, by name.

    Raises:
        ValueError: the file cannot be read, or holds objects of classes, which are never made here.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        mapped = zipfile.is_zipfile(path)  # older files are one pickle, and are loaded whole
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise ValueError(
                f"{path} holds more than tensors, and no code of a file is run here; save the model's state_dict() alone"
            ) from None
        raise ValueError(f"{path} is no file of torch.save, or is damaged ({short(error)})") from None
    except Exception as error:  # a damaged file can make torch's unpickler raise anything
        raise ValueError(f"{path} is no file of torch.save, or is damaged ({short(error)})") from None
    tensors: dict[str, Stored] = {}
    _collect(_model_part(content), "", tensors, 0)
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, but a {type(content).__name__}; save the model's state_dict()")
    return tensors


def _model_part(content: Any) -> Any:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None or any(isinstance(value, Tensor) and value.ndim for value in content.values()):
            break
        content = inner
    return content


def _collect(content: Any, prefix: str, tensors: dict[str, Stored], depth: int) -> None:
    if not isinstance(content, Mapping) or depth > 6:
        return
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Tensor):
            tensors[name] = Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.detach)
        else:
            _collect(value, name, tensors, depth + 1)
