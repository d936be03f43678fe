"""What each arm changes: the loss, the gates' own rate and decay, or the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectral_router import (
    Gate,
    LoadBalanceLoss,
    LossFreeBias,
    OrthogonalityPenalty,
    RouterZLoss,
    find_gates,
    gate_param_groups,
    wrap_moe,
)
from spectral_router.functional import spectral_norm, stable_rank

BALANCE = 0.01  # of the arm both, as in wrap_moe
DECAY = 0.01  # of all weights, in all arms
Weights = Sequence[Tensor]


class NormTerm(nn.Module):
    """Σ (σ_max(W_l) / σ_max at the start − 1)², the first half of "spread"."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Tensor | None = None

    def forward(self, weights: Weights) -> Tensor:
        norms = spectral_norm(torch.stack(list(weights)))
        if self.first is None:
            self.first = norms.detach()
        return (norms / self.first - 1).square().sum()


def rank_term(weights: Weights) -> Tensor:
    """Σ (R(W_l) / min(K, d) − 1)², the second half of "spread"."""
    stacked = torch.stack(list(weights))
    return (stable_rank(stacked) / min(stacked.shape[-2:]) - 1).square().sum()


PENALTIES: dict[str, Callable[[], Any]] = {
    "spread": lambda: "spread",
    "both": lambda: "spread",
    "decoupled": lambda: "spread",
    "norm": NormTerm,
    "rank": lambda: rank_term,
    "ernie": lambda: OrthogonalityPenalty("ernie"),
    "simbal": lambda: OrthogonalityPenalty("simbal"),
}
BALANCES: dict[str, Callable[[], Any]] = {"balance": LoadBalanceLoss, "both": LoadBalanceLoss, "z": RouterZLoss}


def prepare(model: Any, arm: str, strength: float, lr: float) -> torch.optim.Optimizer:
    """Make `model` one of `arm`; the optimizer that trains it."""
    own = arm == "own"
    model.config.output_router_logits = own
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = strength if own else 0.0
    scale = {"slower": strength, "frozen": 0.0}.get(arm, 1.0)
    decay = {"decay": strength, "frozen": 0.0}.get(arm, DECAY)
    groups = gate_param_groups(model, lr, gate_lr_scale=scale, weight_decay=DECAY, gate_weight_decay=decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    if arm in PENALTIES or arm in BALANCES:
        handle = wrap_moe(
            model,
            penalty=PENALTIES[arm]() if arm in PENALTIES else None,
            balance=BALANCES[arm]() if arm in BALANCES else None,
            penalty_coef=strength,
            balance_coef=BALANCE if arm == "both" else strength,
        )
        if arm == "decoupled":
            handle.attach(optimizer, decoupled=True)
    elif arm == "bias":
        for gate in find_gates(model):
            gate.module.register_forward_hook(Biased(gate, strength))
    return optimizer


class Biased:
    """A forward hook on a gate of transformers: who is chosen depends on a bias that follows the load, the weights do not."""

    def __init__(self, gate: Gate, rate: float) -> None:
        self.top_k: int = gate.module.top_k  # type: ignore[assignment]
        self.normalised = bool(getattr(gate.module, "norm_topk_prob", True))  # Mixtral always does
        self.controller = LossFreeBias(gate.num_experts, rate)

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = output[0]
        self.controller.train(module.training)
        indices = self.controller(logits.detach()).topk(self.top_k, dim=-1).indices
        weights = logits.float().softmax(-1).gather(-1, indices)
        self.controller.observe(weights.detach(), indices)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(output[1].dtype), indices
