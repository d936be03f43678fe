"""Small checkpoints for the tests of the report, in every format."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

EXPERTS, DIM, LAYERS = 8, 32, 3


def weights(seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS, dim: int = DIM) -> dict[str, Tensor]:
    """A mixture as many frameworks name it: a gate and stacked experts in each layer, and a selection bias."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embed.weight": torch.randn(16, dim, generator=generator)}
    for layer in range(layers):
        block = f"layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = torch.randn(experts, dim, generator=generator)
        tensors[f"{block}.gate.e_score_correction_bias"] = torch.randn(experts, generator=generator) / 10
        tensors[f"{block}.experts.up_proj"] = torch.randn(experts, dim, 24, generator=generator)
        tensors[f"{block}.experts.gate_proj.weight"] = torch.randn(experts, dim, 24, generator=generator)
        tensors[f"{block}.shared_expert_gate.weight"] = torch.randn(1, dim, generator=generator)
    return tensors


def gates_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".mlp.gate.weight")}


def save_sharded(tensors: dict[str, Tensor], folder: Path, suffix: str = "safetensors", shards: int = 2) -> Path:
    """With an index; `suffix` bin is that of torch.save."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        if suffix == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def save_sparse(shapes: dict[str, tuple[int, ...]], filled: dict[str, Tensor], path: Path) -> None:
    """A safetensors file in bf16 of which only `filled` takes space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        start = file.tell()
        for name, tensor in filled.items():
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.bfloat16().view(torch.uint8).numpy().tobytes())
        file.truncate(start + end)
