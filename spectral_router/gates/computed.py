"""Weights that hooks of `torch.nn.utils` compute before each forward, from other parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computed(owner: nn.Module, name: str) -> Tensor | None:
    """The weight as its next forward will have it, with a graph of its own; None if it is a plain parameter.

    The attribute itself is that of the last forward, whose graph a backward has used up.
    """
    if name in owner._parameters or not owner._forward_pre_hooks:
        return None
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(owner, do_power_iteration=False)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(owner)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(owner)
    return None
