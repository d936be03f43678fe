"""Float32 at least, whatever comes in and whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off. Not even asked for where it is off already: on small gates that takes as long as the computation."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
