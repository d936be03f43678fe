"""Models built like those of mixture-of-experts toolkits: the same names, nesting, shapes and return values, own code."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, ExpectedGate, seeded
from .parts import (
    DIM,
    EXPERTS,
    TOP_K,
    Block,
    Expert,
    Recorder,
    Stack,
    experts,
    matrix,
    mix,
    recorded,
    run_all,
    spread,
    stack_case,
    top_share,
)

# ------------------------------------------------------------------------------------------------------------------ tutel


class TutelLinearGate(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(DIM, EXPERTS, bias=False)
        self.fp32_gate = True

    def forward(self, x: Tensor) -> Tensor:
        wg = self.wg.float() if self.fp32_gate else self.wg
        logits = wg(x.to(wg.weight.dtype))
        self.true_probs = logits.softmax(-1)
        return logits


class TutelCosineGate(Recorder):
    """Cosines in a projected space; `sim_matrix` has one COLUMN an expert, and both factors are normalised."""

    def __init__(self, proj_dim: int = 12) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([math.log(1 / 0.5)]))
        self.cosine_projector = nn.Linear(DIM, proj_dim)
        self.sim_matrix = matrix(proj_dim, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(self.cosine_projector(x), dim=1) @ F.normalize(self.sim_matrix, dim=0)
        logits = cosines * self.temperature.clamp(max=math.log(100)).exp()
        self.true_probs = logits.softmax(-1)
        return logits


class TutelExperts(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.batched_fc1_w = matrix(EXPERTS, hidden, DIM)
        self.batched_fc2_w = matrix(EXPERTS, hidden, DIM)
        self.batched_fc1_bias = matrix(EXPERTS, hidden)
        self.batched_fc2_bias = matrix(EXPERTS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(x @ self.batched_fc1_w.mT + self.batched_fc1_bias[:, None])
        return hidden @ self.batched_fc2_w + self.batched_fc2_bias[:, None]


class TutelMoE(Recorder):
    """The gates are a list, and the layer adds noise to what they return."""

    def __init__(self, gate: type[nn.Module] = TutelLinearGate, gate_noise: float = 1.0) -> None:
        super().__init__()
        self.num_global_experts = EXPERTS
        self.gate_noise = gate_noise
        self.experts = TutelExperts()
        self.gates = nn.ModuleList([gate()])

    def forward(self, x: Tensor, gate_index: int = 0) -> Tensor:
        tokens = x.reshape(-1, DIM)
        logits = self.gates[gate_index](tokens)
        if self.training:
            logits = logits + self.gate_noise * torch.randn_like(logits) / self.num_global_experts
        scores = logits.softmax(-1)
        self.l_aux = EXPERTS * scores.mean(0).square().sum()
        return mix(self.experts(tokens), spread(*top_share(scores))).reshape(x.shape)


class SwinMoEMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._moe_layer = TutelMoE()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._moe_layer(x), self._moe_layer.l_aux


class SwinStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block("mlp", Expert()), Block("mlp", SwinMoEMlp())])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build_swin() -> tuple[nn.Module, dict[str, Any]]:
    return Stack("layers", [SwinStage(), SwinStage()]), {"x": torch.randn(2, 6, DIM)}


def swin_gate(stage: int) -> ExpectedGate:
    gate = f"layers.{stage}.blocks.1.mlp._moe_layer.gates.0"
    return ExpectedGate(f"{gate}.wg.weight", EXPERTS, "softmax", gate, recorded)


# ---------------------------------------------------------------------------------------------------------------- fastmoe


class FastNaiveGate(Recorder):
    """Softmax over the chosen experts only; returns `(indices, weights)` in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS)
        self.top_k = TOP_K
        self.tot_expert = EXPERTS

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        self.true_probs = logits.softmax(-1)
        best, indices = logits.topk(self.top_k, dim=-1)
        return indices, best.softmax(-1)


class FastNoisyGate(Recorder):
    """Raw matrices `(dim, experts)`: one for the logits, and a look-alike for the width of their noise."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gate = matrix(DIM, EXPERTS)
        self.w_noise = matrix(DIM, EXPERTS)
        self.top_k = TOP_K
        self.tot_expert = EXPERTS

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        clean = x @ self.w_gate
        self.true_probs = clean.softmax(-1)
        width = (F.softplus(x @ self.w_noise) + 0.01) * self.training
        best, indices = (clean + torch.randn_like(clean) * width).topk(self.top_k, dim=-1)
        return indices, best.softmax(-1)


class FastLinear(nn.Module):
    def __init__(self, in_feat: int, out_feat: int) -> None:
        super().__init__()
        self.num_expert = EXPERTS
        self.weight = matrix(EXPERTS, out_feat, in_feat)
        self.bias = matrix(EXPERTS, out_feat)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias[:, None]


class FastExperts(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.htoh4 = FastLinear(DIM, hidden)
        self.h4toh = FastLinear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.h4toh(F.gelu(self.htoh4(x)))


class FastMoE(nn.Module):
    def __init__(self, gate: type[nn.Module], fused: bool) -> None:
        super().__init__()
        self.num_expert = EXPERTS
        self.gate = gate()
        self.experts = FastExperts() if fused else experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, DIM)
        indices, weights = self.gate(tokens)
        outputs = run_all(self.experts, tokens) if isinstance(self.experts, nn.ModuleList) else self.experts(tokens)
        return mix(outputs, spread(weights, indices)).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------- MegaBlocks


class MegaBlocksRouter(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.9, 1.1)
        scores = self.layer(x.view(-1, DIM)).softmax(-1)
        self.true_probs = scores
        weights, indices = top_share(scores)
        return scores, weights, indices


class MegaBlocksMlp(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.w1 = matrix(EXPERTS * hidden, DIM)
        self.w2 = matrix(EXPERTS * hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1.unflatten(0, (EXPERTS, -1)).mT) @ self.w2.unflatten(0, (EXPERTS, -1))


class MegaBlocksExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MegaBlocksMlp()

    def forward(self, x: Tensor, scores: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return mix(self.mlp(x.reshape(-1, DIM)), spread(weights, indices)).reshape(x.shape)


class MegaBlocksMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = MegaBlocksRouter()
        self.experts = MegaBlocksExperts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x))


TOOLKITS: tuple[Case, ...] = (
    stack_case("tutel_linear", TutelMoE, {"gates.0.wg.weight": "gates.0"}, slot="moe"),
    stack_case("tutel_cosine", partial(TutelMoE, TutelCosineGate), {"gates.0.sim_matrix": "gates.0"}, slot="moe"),
    Case("swin_moe", seeded(build_swin), (swin_gate(0), swin_gate(1))),
    stack_case("fastmoe_naive", partial(FastMoE, FastNaiveGate, True), {"gate.gate.weight": "gate"}),
    stack_case("fastmoe_noisy", partial(FastMoE, FastNoisyGate, False), {"gate.w_gate": "gate"}),
    stack_case("megablocks", MegaBlocksMoE, {"router.layer.weight": "router"}, path="transformer.blocks", slot="ffn"),
)
