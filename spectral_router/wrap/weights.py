"""The weights of a wrapped model's gates: which are one and the same, which learn, and a sharded one made whole."""

from __future__ import annotations

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


def trainable(gate: Gate) -> bool:
    if gate.adapter is not None:
        return any(parameter.requires_grad for parameter in gate.adapter.parameters())
    name = gate.parameter.rpartition(".")[2]
    parametrized = getattr(gate.owner, "parametrizations", {})
    if name in parametrized:
        return any(parameter.requires_grad for parameter in parametrized[name].parameters())
    return gate.matrix.requires_grad
