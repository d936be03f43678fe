"""Models built like the code that checkpoints bring along, and like older transformers releases: own code, same interface."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case
from .parts import (
    DIM,
    EXPERTS,
    TOP_K,
    Expert,
    GroupedExperts,
    Recorder,
    experts,
    matrix,
    mix,
    run_all,
    spread,
    stack_case,
    top_share,
)


class WithAuxiliaryLoss(torch.autograd.Function):
    """Hands the output on unchanged and gives the auxiliary loss a gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


class DeepseekGate(Recorder):
    """`(indices, weights, auxiliary loss)`: no output is as wide as the experts are many."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.n_routed_experts = EXPERTS
        self.weight = matrix(EXPERTS, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.true_probs = F.linear(x.view(-1, DIM), self.weight).softmax(-1)
        weights, indices = top_share(scores, self.top_k)
        share = indices.flatten().bincount(minlength=EXPERTS) / indices.numel()
        return indices, weights, 0.01 * EXPERTS * (share * scores.mean(0)).sum()


class DeepseekV3Gate(Recorder):
    """`(indices, weights)` of sigmoid scores; the correction bias picks experts and is not in their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.n_routed_experts = EXPERTS
        self.weight = matrix(EXPERTS, DIM)
        self.e_score_correction_bias = matrix(EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.view(-1, DIM).float(), self.weight.float()).sigmoid()
        self.true_probs = scores / scores.sum(-1, keepdim=True)
        indices = (scores.detach() + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        return indices, 2.5 * weights / weights.sum(-1, keepdim=True)


class DeepseekMoE(nn.Module):
    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.experts = experts()
        self.gate = gate()
        self.shared_experts = Expert()

    def forward(self, x: Tensor) -> Tensor:
        indices, weights, *aux = self.gate(x)
        tokens = x.view(-1, DIM)
        out = mix(run_all(self.experts, tokens), spread(weights, indices)).view(x.shape)
        if self.training and aux:
            out = WithAuxiliaryLoss.apply(out, aux[0])
        return out + self.shared_experts(x)


class OpenMoERouter(nn.Module):
    """Takes logits to weights and holds no parameter."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = logits.softmax(-1).topk(TOP_K, dim=-1)
        combine = spread(weights, indices)
        return combine, combine > 0


class OpenMoEExperts(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.wi_gate = matrix(EXPERTS, DIM, hidden)
        self.wi_up = matrix(EXPERTS, DIM, hidden)
        self.wo = matrix(EXPERTS, hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.wi_gate) * (x @ self.wi_up)) @ self.wo


class OpenMoE(Recorder):
    """The gate is a raw parameter of the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_weight = matrix(EXPERTS, DIM)
        self.router = OpenMoERouter()
        self.experts = OpenMoEExperts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        logits = F.linear(tokens, self.gate_weight)
        self.true_probs = logits.softmax(-1)
        combine, mask = self.router(logits)
        return mix(self.experts(tokens), combine * mask).reshape(x.shape)


class MixtralBlock(Recorder):
    """transformers 4: the gate is a Linear, and the layer does the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.top_k = TOP_K
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.view(-1, DIM)
        logits = self.gate(tokens)
        probs = self.true_probs = F.softmax(logits, dim=1, dtype=torch.float)
        out = mix(run_all(self.experts, tokens), spread(*top_share(probs, self.top_k)))
        return out.reshape(x.shape), logits


class SparseScoresRouter(Recorder):
    """gpt-oss in transformers 4: `(scores, indices)`, the scores softmaxed over the chosen experts and zero elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.num_experts = EXPERTS
        self.weight = matrix(EXPERTS, DIM)
        self.bias = matrix(EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, DIM), self.weight, self.bias)
        self.true_probs = logits.softmax(-1)
        best, indices = logits.topk(self.top_k, dim=-1)
        return spread(best.softmax(-1), indices), indices


class SoftmaxedLogitsRouter(Recorder):
    """transformers 5.0 to 5.4: what it returns first, and calls logits, are probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.num_experts = EXPERTS
        self.weight = matrix(EXPERTS, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = F.linear(x.reshape(-1, DIM), self.weight)
        router_logits = self.true_probs = F.softmax(router_logits.float(), dim=-1)
        weights, indices = top_share(router_logits, self.top_k)
        return router_logits, spread(weights, indices), indices


class SoftCappedRouter(Recorder):
    """Logits pressed into `(-cap, cap)` by a tanh. The cap is low here, so that it shows."""

    def __init__(self, cap: float = 0.5) -> None:
        super().__init__()
        self.cap = cap
        self.weight = matrix(EXPERTS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.cap * torch.tanh(F.linear(x.reshape(-1, DIM), self.weight) / self.cap)
        self.true_probs = logits.softmax(-1)
        return logits


class TemperatureRouter(Recorder):
    """Logits divided by a temperature that is trained."""

    def __init__(self, temperature: float = 0.3) -> None:
        super().__init__()
        self.weight = matrix(EXPERTS, DIM)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.reshape(-1, DIM), self.weight) / self.temperature
        self.true_probs = logits.softmax(-1)
        return logits


class GroupedBlock(nn.Module):
    """A router module and experts in three-dimensional parameters.

    The router returns logits `(tokens, experts)`, or a tuple that ends in sparse weights and indices.
    """

    def __init__(self, router: type[nn.Module]) -> None:
        super().__init__()
        self.router = router()
        self.experts = GroupedExperts()

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x)
        if isinstance(out, tuple):
            *_, combine, _ = out
        else:
            combine = spread(*top_share(out.softmax(-1)))
        return mix(self.experts(x.reshape(-1, DIM)), combine).reshape(x.shape)


REMOTE_CODE: tuple[Case, ...] = (
    stack_case("deepseek_moe_remote", partial(DeepseekMoE, DeepseekGate), {"gate.weight": "gate"}, path="model.layers"),
    stack_case(
        "deepseek_v3_remote",
        partial(DeepseekMoE, DeepseekV3Gate),
        {"gate.weight": "gate"},
        scoring="sigmoid",
        path="model.layers",
    ),
    stack_case("openmoe", OpenMoE, "gate_weight", path="model.layers"),
    stack_case("mixtral_4", MixtralBlock, "gate.weight", path="model.layers", slot="block_sparse_moe"),
    *(
        stack_case(name, partial(GroupedBlock, router), {"router.weight": "router"}, path="model.layers")
        for name, router in (
            ("gpt_oss_4", SparseScoresRouter),
            ("softmaxed_logits", SoftmaxedLogitsRouter),
            ("soft_cap", SoftCappedRouter),
            ("temperature", TemperatureRouter),
        )
    ),
)
