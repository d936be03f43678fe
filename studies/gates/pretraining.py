"""Models built like those of torchtitan and OLMo-core: the same names, nesting, weight shapes and return values, own code."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case
from .parts import DIM, EXPERTS, TOP_K, Recorder, matrix, mix, spread, stack_case


class TorchtitanRouter(Recorder):
    def __init__(self, score_func: str) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.num_experts = EXPERTS
        self.top_k = TOP_K
        self.score_func = score_func

    def forward(self, x: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        scores = logits.float().sigmoid() if self.score_func == "sigmoid" else logits.float().softmax(-1)
        self.true_probs = scores / scores.sum(-1, keepdim=True)
        indices = (scores + expert_bias).topk(self.top_k, dim=-1).indices
        return scores.gather(-1, indices), indices, indices.flatten().bincount(minlength=self.num_experts)


class TorchtitanExperts(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = matrix(EXPERTS, hidden, DIM)
        self.w2 = matrix(EXPERTS, DIM, hidden)
        self.w3 = matrix(EXPERTS, hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.w1.mT) * (x @ self.w3.mT)) @ self.w2.mT


class TorchtitanMoE(nn.Module):
    def __init__(self, score_func: str) -> None:
        super().__init__()
        self.experts = TorchtitanExperts()
        self.router = TorchtitanRouter(score_func)
        self.register_buffer("expert_bias", 0.1 * torch.randn(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        scores, indices, _ = self.router(tokens, self.expert_bias)
        return mix(self.experts(tokens), spread(scores, indices)).reshape(x.shape)


class OlmoRouter(Recorder):
    """The weight is one-dimensional, so that it can be sharded into more pieces than there are experts."""

    def __init__(self, gating_function: str = "softmax") -> None:
        super().__init__()
        self.d_model = DIM
        self.num_experts = EXPERTS
        self.top_k = TOP_K
        self.gating_function = gating_function
        self.weight = matrix(EXPERTS * DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits = F.linear(x.float(), self.weight.view(self.num_experts, self.d_model).float())
        scores = logits.softmax(-1) if self.gating_function == "softmax" else logits.sigmoid()
        self.true_probs = scores / scores.sum(-1, keepdim=True)
        weights, indices = scores.topk(self.top_k, dim=-1)
        return weights, indices, indices.flatten().bincount(minlength=self.num_experts), None


class OlmoMlp(nn.Module):
    """Experts flattened into two dimensions, for the reason of the router."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = matrix(EXPERTS * DIM, hidden)
        self.w2 = matrix(EXPERTS * hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ self.w1.unflatten(0, (EXPERTS, -1))) @ self.w2.unflatten(0, (EXPERTS, -1))


class OlmoExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = OlmoMlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class OlmoMoE(nn.Module):
    def __init__(self, gating_function: str = "softmax") -> None:
        super().__init__()
        self.router = OlmoRouter(gating_function)
        self.experts = OlmoExperts()

    def forward(self, x: Tensor) -> Tensor:
        weights, indices, _, _ = self.router(x)
        combine = spread(weights, indices).reshape(-1, EXPERTS)
        return mix(self.experts(x.reshape(-1, DIM)), combine).reshape(x.shape)


PRETRAINING: tuple[Case, ...] = (
    *(
        stack_case(
            f"torchtitan_{scoring}",
            partial(TorchtitanMoE, scoring),
            {"router.gate.weight": "router"},
            scoring=scoring,
            slot="moe",
            container=nn.ModuleDict,
        )
        for scoring in ("sigmoid", "softmax")
    ),
    *(
        stack_case(
            f"olmo_core_{scoring}",
            partial(OlmoMoE, scoring),
            {"router.weight": "router"},
            scoring=scoring,
            path="blocks",
            slot="feed_forward_moe",
            container=nn.ModuleDict,
        )
        for scoring in ("softmax", "sigmoid")
    ),
)
