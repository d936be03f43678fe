"""State of a penalty or balance loss, buffers that are made late included: out of a handle and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensors(part: object) -> dict[str, Tensor]:
    if not isinstance(part, nn.Module):
        return {}
    return {name: tensor.detach().clone() for name, tensor in (*part.named_parameters(), *part.named_buffers())}


def restore(part: nn.Module, tensors: Mapping[str, Tensor], device: Any) -> None:
    """Buffers that are made at the first call, or stay out of `state_dict`, come back too."""
    persistent = set(part.state_dict())
    for path, tensor in tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = part.get_submodule(owner_path)
        current = getattr(owner, name, None)
        if isinstance(current, Tensor) and current.shape == tensor.shape:
            current.data.copy_(tensor)
        else:
            stays = path in persistent or name in owner._buffers
            owner.register_buffer(name, tensor.detach().clone().to(device), persistent=stays)
