"""Parameter groups for an optimizer: the gates apart from the rest, at a rate of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..gates.gate import Gate
from ..gates.select import Selector, select_gates
from .weights import leaves_of


def gate_param_groups(
    model: nn.Module,
    lr: float,
    *,
    gate_lr_scale: float = 0.1,
    weight_decay: float | None = None,
    gate_weight_decay: float | None = None,
    gates: Selector | None = None,
    exclude: Selector | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer in which the router gates learn at `gate_lr_scale * lr`.

    At high rates a linear gate grows and hardens before its experts have learnt anything, and some get no tokens; slower gates
    leave fewer experts dead. A schedule scales both rates alike. Call it before or after `wrap_moe`, after PEFT and sharding.

    Args:
        model: any module with router gates.
        lr: rate of everything else, above 0.
        gate_lr_scale: of the gates' rate, at least 0; 0 keeps them as they are, 1 is one rate for all.
        weight_decay: of everything else, at least 0, on tensors of two dimensions and more; biases and norms get 0, as in
            transformers' Trainer. None leaves it to the optimizer, for all alike.
        gate_weight_decay: of the gates; None is as the rest.
        gates, exclude: which gates, as in `wrap_moe`; None finds them all.

    Returns:
        one to three groups: `{"name": "gates", "params", "lr"}` and `{"name": "others", ...}`, with "weight_decay" where it was
        given, then "vectors" apart from "others". Parameters that do not learn are in none.

    Raises:
        ValueError: a number out of its range, no gate found, or gates without a parameter that learns.

    >>> model = nn.ModuleDict({"router": nn.Linear(16, 4), "experts": nn.ModuleList(nn.Linear(16, 16) for _ in range(4))})
    >>> optimizer = torch.optim.AdamW(gate_param_groups(model, lr=1e-3, gate_lr_scale=0.1))
    >>> [(group["name"], len(group["params"]), group["lr"]) for group in optimizer.param_groups]
    [('others', 8, 0.001), ('gates', 2, 0.0001)]

    With transformers' Trainer or TRL's, `Trainer(..., optimizers=(optimizer, None))`: the schedule is still the trainer's.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a finite number above 0, got {lr=}")
    if not 0 <= gate_lr_scale < math.inf:
        raise ValueError(f"gate_lr_scale must be a finite number of at least 0, got {gate_lr_scale=}")
    for name, decay in (("weight_decay", weight_decay), ("gate_weight_decay", gate_weight_decay)):
        if decay is not None and not 0 <= decay < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0 or None, got {name}={decay}")
    chosen = select_gates(model, gates, exclude)
    of_gates = list(dict.fromkeys(parameter for gate in chosen for parameter in made_of(gate)))
    if not of_gates:
        raise ValueError("the gates must have a parameter that learns, got none; leave them to the optimizer as they are")
    own = {id(parameter) for parameter in of_gates}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    groups: list[dict[str, Any]] = [{"name": "others", "params": others, "lr": lr}]
    if weight_decay is not None:
        vectors = [parameter for parameter in others if parameter.ndim < 2]
        groups[0] |= {"params": [parameter for parameter in others if parameter.ndim >= 2], "weight_decay": weight_decay}
        groups.append({"name": "vectors", "params": vectors, "lr": lr, "weight_decay": 0.0})
    groups.append({"name": "gates", "params": of_gates, "lr": gate_lr_scale * lr})
    decay = weight_decay if gate_weight_decay is None else gate_weight_decay
    if decay is not None:
        groups[-1]["weight_decay"] = decay
    return [group for group in groups if group["params"]]


def made_of(gate: Gate) -> list[nn.Parameter]:
    """The learning parameters that the gate's weight and bias are made of, none that only lie beside them."""
    bias = getattr(gate.owner, "bias", None)
    found = [bias] if isinstance(bias, nn.Parameter) and bias.requires_grad and bias.shape == (gate.num_experts,) else []
    leaves = leaves_of(gate)
    matrix = gate.matrix
    if isinstance(matrix, nn.Parameter) and gate.adapter is None:
        return ([matrix] if matrix.requires_grad else []) + found
    with torch.enable_grad():
        weight: Tensor = gate.weight
        parts = torch.autograd.grad(weight.sum(), leaves, allow_unused=True) if weight.requires_grad else [None] * len(leaves)
    return [leaf for leaf, part in zip(leaves, parts, strict=True) if part is not None] + found
