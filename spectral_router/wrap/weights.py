"""The weights of a wrapped model's gates: which are one and the same, which learn, and a sharded one made whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._sharding import whole
from ..gates.gate import Gate


def tied(gates: list[Gate]) -> list[list[int]]:
    """Groups of gates with one and the same parameter, by index."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for index, gate in enumerate(gates):
        matrix = gate.matrix
        # a parametrized one is computed at each access
        identity = id(matrix) if isinstance(matrix, nn.Parameter) else -1 - index
        groups.setdefault((identity, gate.index), []).append(index)
    return list(groups.values())


def full_weight(gate: Gate) -> Tensor:
    """The weight of a gate outside of a forward, whole on this rank; a collective where it is sharded."""
    # inside a forward, asking a module for a parameter makes ZeRO-3 gather it, now and for the backward
    parameters = [gate.matrix]
    parameters += [] if gate.adapter is None else gate.adapter.parameters()
    empty = [parameter for parameter in parameters if hasattr(parameter, "ds_id") and not parameter.numel()]
    if empty:
        import deepspeed  # type: ignore[import-untyped,unused-ignore]

        with deepspeed.zero.GatheredParameters(empty):
            return gate.weight.clone()
    return whole(gate.weight)


def plain_matrix(gate: Gate) -> nn.Parameter | None:
    """The parameter that a gate's weight is, just as it is and all of it here; None where it is more or less than that."""
    matrix = gate.matrix
    plain = (
        type(matrix) is nn.Parameter
        and gate.adapter is None
        and gate.index is None
        and matrix.ndim == 2
        and matrix.shape[1 if gate.transposed else 0] == gate.num_experts
        and not hasattr(matrix, "ds_id")
    )
    return matrix if plain else None  # type: ignore[return-value]  # type() has said so


def trainable(gate: Gate) -> bool:
    if gate.adapter is not None:
        return any(parameter.requires_grad for parameter in gate.adapter.parameters())
    name = gate.parameter.rpartition(".")[2] if isinstance(gate.parameter, str) else ""
    parametrized = getattr(gate.owner, "parametrizations", {})
    if name in parametrized:
        return any(parameter.requires_grad for parameter in parametrized[name].parameters())
    return gate.matrix.requires_grad


def learns_from(gate: Gate) -> bool:
    """Whether its balance teaches something: the gate, or, where a buffer scores, what lies before it."""
    return gate.buffered or trainable(gate)


def leaves_of(gate: Gate) -> list[nn.Parameter]:
    """The learning parameters that a gate's weight and bias can be made of, each once."""
    modules = [gate.owner] + ([] if gate.adapter is None else [gate.adapter])
    own = (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
    return list(dict.fromkeys(own))


def sources(gate: Gate, slope: Tensor, bias: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that a gate's effective weight (and bias) is made of, each with its part of a gradient of these."""
    leaves = leaves_of(gate)
    if not leaves:
        return []
    with torch.enable_grad():
        weight = whole(gate.weight)
        outputs, slopes = [weight], [slope.to(weight.dtype)]
        if bias is not None:
            outputs.append(whole(gate.owner.bias))  # type: ignore[arg-type]
            slopes.append(bias.to(outputs[-1].dtype))
        made = [(made, slope) for made, slope in zip(outputs, slopes, strict=True) if made.requires_grad]
        parts = torch.autograd.grad([one for one, _ in made], leaves, [slope for _, slope in made], allow_unused=True)
    return [(leaf, part) for leaf, part in zip(leaves, parts, strict=True) if part is not None]


def add_to_gradients(gate: Gate, slope: Tensor, bias: Tensor | None, held: set[int]) -> None:
    """Add a gradient of the effective weight to the `.grad` of the parameters behind it that the optimizer holds."""
    for parameter, part in sources(gate, slope, bias):
        if id(parameter) in held:
            parameter.grad = part.to(parameter.dtype) if parameter.grad is None else parameter.grad.add_(part)
