"""`inspect --data`: the whole model from the checkpoint, one batch through it, and what its gates make of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gates.find import find_gates
from ..wrap.examined import examine
from .by_config import model_class
from .checkpoint import open_checkpoint
from .safetensors_file import safetensors_in
from .stored import Checkpoint, short
from .torch_file import torch_file_in

_TOKENS = 2048  # of a text


def examine_checkpoint(path: str, data: str) -> dict[str, dict[str, Any]]:
    """What `MoEHandle.report` says of each gate, of a checkpoint that transformers can load.

    Args:
        path: a folder with a config.json.
        data: a text, which the folder's tokenizer cuts; or tensors by name (`input_ids`, ...) in a .pt or .safetensors file.

    Raises:
        ValueError: the model or the batch cannot be loaded, or does not run.
        ModuleNotFoundError: transformers is missing.
    """
    checkpoint = open_checkpoint(path)
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"--data runs the model, and {path} has no config.json that names one")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    batch = _batch(Path(data), folder)
    try:
        kind, config = model_class(checkpoint.config, str(names[0]))
        model = kind.from_pretrained(folder, config=config, local_files_only=True)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'--data needs {error.name}; pip install "spectral-router[transformers]"') from None
    except Exception as error:  # whatever loading a foreign model may raise
        raise ValueError(f"{names[0]} cannot be loaded from {path} ({short(error)})") from None
    gates = find_gates(model)
    try:
        return examine(model, gates, batch, _top_k(checkpoint))
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ValueError(f"{names[0]} does not run on the batch of {data}, {shapes} ({short(error)})") from None


def _top_k(checkpoint: Checkpoint) -> int | None:
    value = checkpoint.says("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "experts_per_token")
    return value if type(value) is int else None


def _batch(file: Path, folder: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"there is no file {file} with data")
    if file.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        found = safetensors_in(file) if file.suffix == ".safetensors" else torch_file_in(file)
        batch = {name: stored.read() for name, stored in found.items()}
        return {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in batch.items()}
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    except Exception as error:
        raise ValueError(f"{file} cannot be cut into tokens by the tokenizer of {folder} ({short(error)})") from None
    return {"input_ids": torch.as_tensor(ids)[:, :_TOKENS]}
