"""Small mixtures of experts as people write them by hand, and as tutorials show them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import PrototypeRouter

from .cases import Case
from .parts import (
    DIM,
    EXPERTS,
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


class NamedGate(Recorder):
    """The gate is a Linear under any name."""

    def __init__(self, name: str, dim: int = DIM, bias: bool = True) -> None:
        super().__init__()
        self.name = name
        self.experts = experts(dim=dim)
        self.add_module(name, nn.Linear(dim, EXPERTS, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probs = self.true_probs = getattr(self, self.name)(tokens).softmax(-1)
        return mix(run_all(self.experts, tokens), spread(*top_share(probs))).reshape(x.shape)


class SoftMixture(Recorder):
    """No top-k: every expert takes part, and tokens are never flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = experts()
        self.gate = nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.true_probs = self.gate(x).softmax(-1)
        return torch.einsum("ebtd,bte->btd", run_all(self.experts, x), probs)


class ManyExperts(Recorder):
    """More experts than dimensions."""

    def __init__(self, num_experts: int = 512) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_experts, bias=False)
        self.experts = GroupedExperts(num_experts, hidden=4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probs = self.true_probs = self.gate(tokens).softmax(-1)
        combine = spread(*top_share(probs, 8), probs.shape[-1])
        return mix(self.experts(tokens), combine).reshape(x.shape)


class RawGate(Recorder):
    """A raw matrix `(dim, experts)` on the layer; where it is square its shape does not tell the orientation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w_gate = matrix(dim, EXPERTS)
        self.experts = experts(dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probs = self.true_probs = (tokens @ self.w_gate).softmax(-1)
        return mix(run_all(self.experts, tokens), spread(*top_share(probs))).reshape(x.shape)


class NoisyTopkRouter(Recorder):
    """makeMoE: two Linear layers of the same shape, of which one only sets the width of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.topkroute_linear = nn.Linear(DIM, EXPERTS)
        self.noise_linear = nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.topkroute_linear(x)
        self.true_probs = logits.softmax(-1)
        noisy = logits + torch.randn_like(logits) * F.softplus(self.noise_linear(x))
        best, indices = noisy.topk(2, dim=-1)
        sparse = torch.full_like(noisy, float("-inf")).scatter(-1, indices, best)
        return sparse.softmax(-1), indices


class MlpRouter(Recorder):
    """Returns probabilities; the experts are scored by the last layer of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIM, 12), nn.Tanh(), nn.Linear(12, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        self.true_probs = self.net(x).softmax(-1)
        return self.true_probs


class NormedRouter(Recorder):
    """The router normalises its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.proj = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.true_probs = self.proj(self.norm(x)).softmax(-1)
        return self.true_probs


class WithRouter(nn.Module):
    """`router` returns probabilities, sparse or not, alone or first in a tuple."""

    def __init__(self, router: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.router = router()
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x)
        combine = out[0] if isinstance(out, tuple) else spread(*top_share(out))
        return mix(run_all(self.experts, x.flatten(0, -2)), combine.flatten(0, -2)).reshape(x.shape)


class SequentialGate(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(DIM, 12), nn.ReLU(), nn.Linear(12, EXPERTS))
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probs = self.true_probs = self.gate(tokens).softmax(-1)
        return mix(run_all(self.experts, tokens), spread(*top_share(probs))).reshape(x.shape)


class IndexGate(nn.Module):
    """Returns the number of the best expert and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(EXPERTS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).argmax(-1)


class IndexMixture(Recorder):
    """The weight of the chosen expert is computed apart from its choice, from the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = IndexGate()
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen = self.gate(tokens)[:, None]
        probs = self.true_probs = F.linear(tokens, self.gate.weight).softmax(-1)
        return mix(run_all(self.experts, tokens), spread(probs.gather(-1, chosen), chosen)).reshape(x.shape)


class TaskGate(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.true_probs = self.linear(x).softmax(-1)
        return self.true_probs


class MultiGateMixture(nn.Module):
    """Recommender systems: several tasks share the experts, and each has a gate of its own."""

    def __init__(self, num_tasks: int = 3) -> None:
        super().__init__()
        self.experts = experts()
        self.gates = nn.ModuleList(TaskGate() for _ in range(num_tasks))
        self.towers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        outputs = run_all(self.experts, tokens)
        tasks = [tower(mix(outputs, gate(tokens))) for gate, tower in zip(self.gates, self.towers, strict=True)]
        return torch.stack(tasks).sum(0).reshape(x.shape)


class PrototypeMixture(Recorder):
    """This library's own router, with soft weights or its two nearest experts."""

    def __init__(self, top_k: int | None) -> None:
        super().__init__()
        self.router = PrototypeRouter(DIM, EXPERTS, top_k=top_k, temperature="auto")
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        _, self.true_probs, weights, indices = self.router(tokens)
        return mix(run_all(self.experts, tokens), spread(weights, indices)).reshape(x.shape)


class SharedExpert(NamedGate):
    """Beside the gate a shared expert with a gate of one row, which routes nothing."""

    def __init__(self) -> None:
        super().__init__("gate", bias=False)
        self.shared_expert = Expert()
        self.shared_expert_gate = nn.Linear(DIM, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


HANDWRITTEN: tuple[Case, ...] = (
    *(
        stack_case(f"linear_{name}", partial(NamedGate, name), f"{name}.weight", slot="moe")
        for name in ("gate", "router", "gating", "w_g", "switch")
    ),
    stack_case("linear_square", partial(NamedGate, "gate", dim=EXPERTS, bias=False), "gate.weight", dim=EXPERTS),
    stack_case("shared_expert_gate", SharedExpert, "gate.weight"),
    stack_case("soft_mixture", SoftMixture, "gate.weight", slot="ffn"),
    stack_case("experts_512", ManyExperts, "gate.weight", num_experts=512),
    stack_case("raw_gate", partial(RawGate, DIM), "w_gate", slot="moe"),
    stack_case("raw_gate_square", partial(RawGate, EXPERTS), "w_gate", slot="moe", dim=EXPERTS),
    stack_case(
        "make_moe",
        partial(WithRouter, NoisyTopkRouter),
        {"router.topkroute_linear.weight": "router"},
        path="blocks",
        slot="smoe",
    ),
    stack_case("mlp_gate", SequentialGate, "gate.2.weight", slot="moe"),
    stack_case("mlp_router", partial(WithRouter, MlpRouter), {"router.net.2.weight": "router"}, slot="moe"),
    stack_case("normed_router", partial(WithRouter, NormedRouter), {"router.proj.weight": "router"}, slot="moe"),
    stack_case("index_gate", IndexMixture, "gate.weight", slot="moe"),
    stack_case(
        "multi_gate", MultiGateMixture, {f"gates.{task}.linear.weight": f"gates.{task}" for task in range(3)}, slot="mmoe"
    ),
    stack_case("prototypes_soft", partial(PrototypeMixture, None), "router.prototypes", slot="moe"),
    stack_case("prototypes_top2", partial(PrototypeMixture, 2), "router.prototypes", slot="moe"),
)
