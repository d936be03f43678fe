"""What every room does with a weight that a sharding engine has spread over ranks."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor, with gradient; a collective where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
