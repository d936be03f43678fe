"""Cases on published mixture-of-experts packages, as installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .parts import DIM, EXPERTS, stack_case

OUTER, INNER = 3, 4


def make_st_moe() -> nn.Module:
    package = importlib.import_module("st_moe_pytorch")
    return package.MoE(dim=DIM, num_experts=EXPERTS, expert_hidden_mult=2)


def make_mixture_of_experts() -> nn.Module:
    package = importlib.import_module("mixture_of_experts")
    return package.MoE(dim=DIM, num_experts=EXPERTS, hidden_dim=24)


def make_hierarchical() -> nn.Module:
    package = importlib.import_module("mixture_of_experts")
    return package.HeirarchicalMoE(dim=DIM, num_experts=(OUTER, INNER), hidden_dim=24)


def softmax_of_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    # gumbel noise, if it is asked for, is added later
    return output.softmax(-1)


def softmax_of_gating(module: nn.Module, args: tuple[Any, ...], output: object) -> Tensor:
    weight = module.get_parameter("w_gating")
    return torch.einsum("...bnd,...de->...bne", args[0], weight).softmax(-1)


def _hierarchical() -> Case:
    # The inner gate is three-dimensional, (OUTER, dim, INNER): a gate over INNER experts for each outer expert. It sees the
    # tokens in the outer experts' slots, (OUTER, batch, capacity, dim). A slot that no token took is all zeros: it is
    # routed evenly, and its row is among the probabilities.
    outer = stack_case(
        "mixture_of_experts_hierarchical",
        make_hierarchical,
        {"gate_outer.w_gating": "gate_outer"},
        num_experts=OUTER,
        slot="moe",
        read=softmax_of_gating,
    )
    inner = stack_case(
        outer.name,
        make_hierarchical,
        {"gate_inner.w_gating": "gate_inner"},
        num_experts=INNER,
        slot="moe",
        read=softmax_of_gating,
    )
    in_order = tuple(gate for pair in zip(outer.expected, inner.expected, strict=True) for gate in pair)
    return Case(outer.name, outer.build, in_order)


LIBRARIES: tuple[Case, ...] = (
    stack_case("st_moe_pytorch", make_st_moe, {"gate.to_gates.weight": "gate.to_gates"}, slot="moe", read=softmax_of_output),
    stack_case("mixture_of_experts", make_mixture_of_experts, {"gate.w_gating": "gate"}, slot="moe", read=softmax_of_gating),
    _hierarchical(),
)
