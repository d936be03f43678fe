"""Float32 at least, whatever comes in and whatever autocast says; measurements that `.half()` leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def autocasting(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off. Not even asked for where it is off already: on small gates that takes as long as the computation."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()


def keep_precision(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """After `.to()`: the buffers have moved to the device, and stay of the dtype that they had, as they are measurements."""
    for name, buffer in before.items():
        moved = module._buffers[name]
        if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
            module._buffers[name] = buffer.to(moved.device)
