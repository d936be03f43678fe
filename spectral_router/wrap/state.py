"""State of a penalty or balance loss, buffers that are made late included: out of a handle and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensors(part: object) -> dict[str, Tensor]:
    if not isinstance(part, nn.Module):
        return {}
    return {name: tensor.detach().clone() for name, tensor in (*part.named_parameters(), *part.named_buffers())}


def check_state(state: Any) -> None:
    """A clear error for what no handle gave."""
    parts = ("gates", "penalty", "balance")
    if not (isinstance(state, Mapping) and all(isinstance(state.get(name), Mapping) for name in parts)):
        got = (", ".join(map(str, state)) or "an empty one") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state must be what state_dict() of a handle gave, with gates, penalty and balance, got {got}")


def restore(part: nn.Module, tensors: Mapping[str, Tensor], device: Any) -> None:
    """Buffers that are made at the first call, or stay out of `state_dict`, come back too."""
    persistent, modules = set(part.state_dict()), dict(part.named_modules())
    for path, tensor in tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = modules.get(owner_path)
        if owner is None or not isinstance(tensor, Tensor):
            raise ValueError(f"the state holds {path!r}, which is no tensor of a {type(part).__name__}")
        current = getattr(owner, name, None)
        if isinstance(current, Tensor) and current.shape == tensor.shape:
            current.data.copy_(tensor)
        else:
            stays = path in persistent or name in owner._buffers
            owner.register_buffer(name, tensor.detach().clone().to(device), persistent=stays)
