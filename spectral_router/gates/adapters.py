"""The weight that a gate has under the adapters of PEFT, whatever their method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._precision import full_precision
from .._sharding import whole

# PEFT's LoRA on a parameter, of any module
_ON_PARAMETER = "ParamWrapper"


def adapts(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT around another one."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def on_parameter(adapter: nn.Module) -> bool:
    return type(adapter).__name__ == _ON_PARAMETER


def adapted(weight: Tensor, adapter: nn.Module) -> Tensor:
    """The effective weight of a layer of PEFT, with a graph to its parameters; `weight` is that of the layer inside.

    W + Σ BA for LoRA, m (W + BA) / ||W + BA|| by rows for DoRA, whose norm is a constant as in PEFT, l W for IA3. For any other
    method what the layer itself makes of the identity: W x + b at each unit vector, less b.
    """
    layer: Any = adapter
    if layer.merged or layer.disable_adapters:
        return weight
    active = [name for name in layer.active_adapters if any(name in getattr(layer, at, ()) for at in layer.adapter_layer_names)]
    if not active:
        return weight
    if hasattr(layer, "ia3_l"):
        for name in active:
            scale = layer.ia3_l[name].flatten()
            weight = weight * (scale if layer.is_feedforward else scale[:, None])
        return weight
    variants = getattr(layer, "lora_variant", {})
    if hasattr(layer, "lora_A") and all(type(variants.get(name)).__name__ in _VARIANTS for name in active):
        total = weight
        for name in active:
            delta = layer.get_delta_weight(name)
            if name in variants:
                scale = _dora_scale(weight, delta, layer.lora_magnitude_vector[name].weight, layer.fan_in_fan_out)
                total = total + (scale - 1) * weight + scale * delta
            else:
                total = total + delta
        return total
    return _by_units(layer, weight)


_VARIANTS = ("NoneType", "DoraLinearVariant")


def _dora_scale(weight: Tensor, delta: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    with torch.no_grad():
        norm = torch.linalg.norm(weight + delta, dim=0 if transposed else 1)
    scale = magnitude / norm
    return scale if transposed else scale[:, None]


def _by_units(layer: Any, weight: Tensor) -> Tensor:
    inside = layer.get_base_layer()
    if not isinstance(inside, nn.Linear):
        raise ValueError(
            f"PEFT's {method(layer)} on a {type(inside).__name__} has no weight that is known here; leave the gate out with "
            "exclude=, or adapt it by another method"
        )
    with full_precision(weight.device), _still(layer):
        units = torch.eye(inside.in_features, dtype=weight.dtype, device=weight.device)
        # forward itself: the hooks of the layer are for tokens
        outputs = whole(layer.forward(torch.cat([units, units.new_zeros(1, len(units))])))
        return (outputs[:-1] - outputs[-1]).mT.to(weight.dtype)


@contextmanager
def _still(layer: nn.Module) -> Iterator[None]:
    """Without dropout, of outputs or of ranks."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def method(adapter: nn.Module) -> str:
    """The name of the method, as PEFT's folders have it."""
    return type(adapter).__module__.removeprefix("peft.tuners.").partition(".")[0]


@torch.no_grad()
def refuse_what_is_no_weight(name: str, adapter: nn.Module, weight: Tensor) -> None:
    """Raises:
    ValueError: the adapted layer is not W x + b, so that nothing can be penalised.
    """
    layer: Any = adapter
    inside = layer.get_base_layer()
    if hasattr(layer, "lora_A") or not isinstance(inside, nn.Linear) or weight.is_meta:
        return
    effective = adapted(weight, adapter)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, inside.in_features, generator=generator).to(weight)
    with full_precision(weight.device), _still(layer):
        change = layer.forward(x) - layer.forward(torch.zeros_like(x))
    error = (change - x @ effective.mT).norm() / change.norm().clamp_min(1e-30)
    if not error < (1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"gate {name!r}: what PEFT's {method(adapter)} makes of it is not W x + b, so there is no weight to penalise; "
            "leave it out with exclude=, or adapt it by another method"
        )
