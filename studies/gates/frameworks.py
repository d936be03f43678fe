"""Models built like those of training frameworks: the same names, nesting, weight shapes and return values, own code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case
from .parts import DIM, EXPERTS, TOP_K, Expert, Recorder, experts, matrix, mix, run_all, spread, stack_case, top_share


def with_capacity(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Sparse gates `(tokens, experts)` -> combine weights and dispatch mask, both `(tokens, experts, capacity)`."""
    capacity = len(gates)  # no token is dropped
    slot = ((gates > 0).long().cumsum(0) - 1).clamp_min(0)
    combine = gates[..., None] * F.one_hot(slot, capacity)
    return combine, combine > 0


# ------------------------------------------------------------------------------------------------- DeepSpeed and fairseq


class DeepSpeedGate(Recorder):
    """`wg` is a Linear, but its weight is used by F.linear: a hook on `wg` never fires."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = F.linear(x.float(), self.wg.weight.float())
        gates = self.true_probs = logits.softmax(-1)
        combine, dispatch = with_capacity(spread(*top_share(gates)))
        counts = dispatch.sum((0, 2))
        l_aux = EXPERTS * (gates.mean(0) * counts / counts.sum()).sum()
        return l_aux, combine, dispatch, counts


class DeepSpeedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deepspeed_experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(part) for expert, part in zip(self.deepspeed_experts, x, strict=True)])


class DeepSpeedLayer(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.gate = DeepSpeedGate()
        self.experts = DeepSpeedExperts()
        self.num_local_experts = EXPERTS

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        self.l_aux, combine, dispatch, self.exp_counts = self.gate(tokens)
        outputs = self.experts(torch.einsum("sec,sm->ecm", dispatch.type_as(tokens), tokens))
        return torch.einsum("sec,ecm->sm", combine, outputs).reshape(x.shape)


class DeepSpeedMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.deepspeed_moe = DeepSpeedLayer()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.deepspeed_moe(x), self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


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


# ---------------------------------------------------------------------------------------------------------- Megatron-core


class MegatronRouter(Recorder):
    """Returns sparse probabilities `(tokens, experts)` and a boolean routing map; logits never leave it."""

    expert_bias: Tensor | None

    def __init__(self, score_function: str = "softmax", bias: bool = False) -> None:
        super().__init__()
        self.score_function = score_function
        self.topk = TOP_K
        self.weight = matrix(EXPERTS, DIM)
        self.bias = matrix(EXPERTS) if bias else None
        # moves the choice of experts only, not their weights
        self.register_buffer("expert_bias", torch.randn(EXPERTS) if score_function == "sigmoid" else None)

    def gating(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias)

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.view(-1, EXPERTS)
        if self.score_function == "softmax":
            self.true_probs = logits.softmax(-1)
            best, indices = logits.topk(self.topk, dim=-1)
            weights = best.softmax(-1)
        else:
            scores = logits.sigmoid()
            self.true_probs = scores / scores.sum(-1, keepdim=True)
            assert self.expert_bias is not None
            indices = (scores + self.expert_bias).topk(self.topk, dim=-1).indices
            chosen = scores.gather(-1, indices)
            weights = 2.5 * chosen / chosen.sum(-1, keepdim=True)
        probs = spread(weights, indices)
        return probs, probs > 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing(self.gating(x))


class SequentialExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts = EXPERTS
        self.local_experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        return run_all(self.local_experts, x)


class FlatExperts(nn.Module):
    """All experts side by side in two matrices, `(dim, experts * hidden)` and `(experts * hidden, dim)`."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_local_experts = EXPERTS
        self.weight1 = matrix(DIM, EXPERTS * hidden)
        self.weight2 = matrix(EXPERTS * hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(x @ self.weight1).unflatten(-1, (EXPERTS, -1)).movedim(-2, 0)
        return hidden @ self.weight2.unflatten(0, (EXPERTS, -1))


class MegatronMoE(nn.Module):
    def __init__(self, score_function: str = "softmax", bias: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.router = MegatronRouter(score_function, bias)
        self.experts = FlatExperts() if flat else SequentialExperts()
        self.shared_experts = Expert()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        probs, routing_map = self.router(x)
        tokens = x.reshape(-1, DIM)
        out = mix(self.experts(tokens), probs * routing_map) + self.shared_experts(tokens)
        return out.reshape(x.shape), None


FRAMEWORKS: tuple[Case, ...] = (
    stack_case("deepspeed", DeepSpeedMoE, {"deepspeed_moe.gate.wg.weight": "deepspeed_moe.gate"}),
    stack_case("fairseq", FairseqMoE, {"gate.wg.weight": "gate"}, slot="moe_layer"),
    stack_case("megatron", MegatronMoE, {"router.weight": "router"}, path="decoder.layers"),
    stack_case("megatron_bias", partial(MegatronMoE, bias=True), {"router.weight": "router"}, path="decoder.layers"),
    stack_case(
        "megatron_sigmoid",
        partial(MegatronMoE, "sigmoid", flat=True),
        {"router.weight": "router"},
        scoring="sigmoid",
        path="decoder.layers",
    ),
)
