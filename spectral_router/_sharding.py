"""What every room does with a weight that a sharding engine has spread over ranks."""

from __future__ import annotations

from torch import Tensor, nn


def sharded(model: nn.Module) -> bool:
    """Whether an engine keeps parameters in parts, or lends them for a forward: tensor parallelism, FSDP2, ZeRO-3."""
    lends = any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())
    return lends or any(hasattr(parameter, "to_local") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor, with gradient; a collective where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
