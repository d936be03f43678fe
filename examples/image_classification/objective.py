"""Equation 7: task loss, penalty of the routers' weights, balance loss of every layer."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import RouterOutput

from . import terms
from .config import ROUTERS, Config
from .model import SRMoE


class Terms(NamedTuple):
    """Equation 7, total = task + alpha * penalty + beta * balance, and its unweighted parts; scalars."""

    total: Tensor
    task: Tensor
    penalty: Tensor
    balance: Tensor


class Objective(nn.Module):
    """Equation 7 for one router. A term that the router does not use is measured all the same, with coefficient 0, unless
    `measure` is set to False: then it is 0."""

    measure = True

    def __init__(self, config: Config, router: str, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.spec = ROUTERS[router]
        # what changes weights, or what sits in the routers, is no term
        self.alpha = config.alpha if self.spec.spectral and config.penalty in terms.PENALTIES else 0.0
        self.beta = config.beta if self.spec.balance and config.balance in terms.BALANCES else 0.0
        self.penalty = terms.penalty(config)
        self.balance = terms.balance(config)
        self.reads = getattr(self.balance, "reads", "probs")  # probs or logits

    def forward(self, model: SRMoE, logits: Tensor, routed: list[RouterOutput], labels: Tensor) -> Terms:
        task = F.cross_entropy(logits.float(), labels)
        penalty = balance = torch.zeros_like(task)
        if self.alpha or self.measure:
            with contextlib.nullcontext() if self.alpha else torch.no_grad():
                penalty = self.penalty(model.router_weights())
        if self.beta or self.measure:
            # The paper's L_div has no sum over layers; summed here, layer by layer.
            with contextlib.nullcontext() if self.beta else torch.no_grad():
                balance = torch.stack([self.balance(getattr(output, self.reads)) for output in routed]).sum()
        total = task
        if self.alpha:
            total = total + self.alpha * penalty
        if self.beta:
            total = total + self.beta * balance
        return Terms(total, task, penalty, balance)

    def after_step(self, model: SRMoE) -> None:
        if self.spec.spectral:
            terms.after_step(self.config, model.router_weights())

    def after_epoch(self, model: SRMoE, routed: Tensor, optimizer: torch.optim.Optimizer) -> int:
        return terms.after_epoch(self.config, model.router_weights(), routed, optimizer) if self.spec.spectral else 0
