"""Models built like fairseq's, and ways that gates and experts lie in frameworks: own code.

Megatron-Core, torchtitan, OLMo-core and DeepSpeed are in `studies/engines`, themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, normalised
from .parts import DIM, EXPERTS, TOP_K, Expert, Recorder, experts, matrix, mix, spread, stack_case, top_share


def with_capacity(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Sparse gates `(tokens, experts)` -> combine weights and dispatch mask, both `(tokens, experts, capacity)`."""
    capacity = len(gates)  # no token is dropped
    slot = ((gates > 0).long().cumsum(0) - 1).clamp_min(0)
    combine = gates[..., None] * F.one_hot(slot, capacity)
    return combine, combine > 0


class FairseqGate(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        gates = self.true_probs = self.wg(x).softmax(-1)
        combine, dispatch = with_capacity(spread(*top_share(gates)))
        return gates.mean(0).square().sum() * EXPERTS, combine, dispatch, {"entropy_gating": 0.0}


class FairseqMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = FairseqGate()
        self.experts = experts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, DIM)
        l_aux, combine, dispatch, _ = self.gate(tokens)
        parts = torch.einsum("sec,sm->ecm", dispatch.type_as(tokens), tokens)
        outputs = torch.stack([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.einsum("sec,ecm->sm", combine, outputs).reshape(x.shape), l_aux


class SparseGate(Recorder):
    """Returns sparse probabilities `(tokens, experts)` and a boolean map; its layer is not called, its weight is used."""

    expert_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(DIM, EXPERTS, bias=False)
        self.score_function = "sigmoid"
        # moves the choice of experts only, not their weights
        self.register_buffer("expert_bias", torch.randn(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.wg.weight.float()).view(-1, EXPERTS).sigmoid()
        self.true_probs = normalised(scores)
        indices = (scores + self.expert_bias).topk(TOP_K, dim=-1).indices
        probs = spread(2.5 * normalised(scores.gather(-1, indices)), indices)
        return probs, probs > 0


class FlatColumns(nn.Module):
    """All experts side by side in two matrices, `(dim, experts * hidden)` and `(experts * hidden, dim)`."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_local_experts = EXPERTS
        self.weight1 = matrix(DIM, EXPERTS * hidden)
        self.weight2 = matrix(EXPERTS * hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(x @ self.weight1).unflatten(-1, (EXPERTS, -1)).movedim(-2, 0)
        return hidden @ self.weight2.unflatten(0, (EXPERTS, -1))


class ColumnsMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = SparseGate()
        self.experts = FlatColumns()
        self.shared_experts = Expert()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        probs, routing_map = self.router(x)
        tokens = x.reshape(-1, DIM)
        out = mix(self.experts(tokens), probs * routing_map) + self.shared_experts(tokens)
        return out.reshape(x.shape), None


class FlatGate(Recorder):
    """The weight is one-dimensional, so that it can be sharded into more pieces than there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = matrix(EXPERTS * DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        scores = self.true_probs = F.linear(x.float(), self.weight.view(EXPERTS, DIM).float()).softmax(-1)
        weights, indices = scores.topk(TOP_K, dim=-1)
        return weights, indices, indices.flatten().bincount(minlength=self.num_experts), None


class FlatRows(nn.Module):
    """Experts flattened into two dimensions, one below the other, for the reason of the gate."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = matrix(EXPERTS * DIM, hidden)
        self.w2 = matrix(EXPERTS * hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.w1.unflatten(0, (EXPERTS, -1))) @ self.w2.unflatten(0, (EXPERTS, -1))


class RowsMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = FlatGate()
        self.experts = nn.ModuleDict({"mlp": FlatRows()})

    def forward(self, x: Tensor) -> Tensor:
        weights, indices, _, _ = self.router(x)
        combine = spread(weights, indices).reshape(-1, EXPERTS)
        return mix(self.experts["mlp"](x.reshape(-1, DIM)), combine).reshape(x.shape)


FRAMEWORKS: tuple[Case, ...] = (
    stack_case("fairseq", FairseqMoE, {"gate.wg.weight": "gate"}, slot="moe_layer"),
    stack_case("flat_columns", ColumnsMoE, {"router.wg.weight": "router"}, scoring="sigmoid", path="decoder.layers"),
    stack_case(
        "flat_rows",
        RowsMoE,
        {"router.weight": "router"},
        path="blocks",
        slot="feed_forward_moe",
        container=nn.ModuleDict,
    ),
)
