"""Times: the change that the term makes to what the optimizer does to the gates, over the term's gradient written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty

PENALTY, BALANCE = 0.5, 0.5  # coefficients
Slopes = dict[str, Tensor]


def terms(balance: bool) -> dict[str, Any]:
    """What `wrap_moe` is called with. The penalty has no anchors, so that it is known by hand."""
    own: dict[str, Any] = {} if balance else {"balance": None}
    return {"penalty": SpectralRankPenalty(1.0), "penalty_coef": PENALTY, "balance_coef": BALANCE, **own}


def penalty_slope(weight: Tensor) -> Tensor:
    """Gradient of equations 3 + 5 by an SVD in float64, (K, D)."""
    leaf = weight.detach().double().requires_grad_()
    sigmas = torch.linalg.svdvals(leaf)
    term = (sigmas[0] - 1) ** 2 + (sigmas.square().sum() / sigmas[0] ** 2 - min(leaf.shape)) ** 2
    return PENALTY * torch.autograd.grad(term, leaf)[0]


def balance_slope(weight: Tensor, tokens: Tensor, score: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
    """Gradient of equation 6, (std / mean)² of the experts' mean probability, for one call of the gate on tokens (T, D)."""
    leaf = weight.detach().double().requires_grad_()
    logits = tokens.double() @ leaf.mT + (0 if bias is None else bias.double())
    share = score(logits).mean(0)
    return BALANCE * torch.autograd.grad(share.var(correction=0) / share.mean() ** 2, leaf)[0]


@contextmanager
def listening(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The tokens that the gates get, one entry a call, (T, D)."""
    heard: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # no recomputation
                heard[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

        return hook

    hooks = [module.register_forward_pre_hook(hear(name)) for name, module in modules.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(
    weights: Slopes, heard: dict[str, list[Tensor]], balance: bool, score: Callable[[Tensor], Tensor] = lambda x: x.softmax(-1)
) -> Slopes:
    """The term's gradient for each gate: that of the penalty, and the mean of the balance's over all calls of all ranks."""
    slopes = {name: penalty_slope(weight) for name, weight in weights.items()}
    if balance:
        own = {name: [balance_slope(weights[name], x, score) for x in calls] for name, calls in heard.items() if calls}
        everybody: list[Any] = [own]
        if dist.is_initialized():
            everybody = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, own)
        for name in slopes:
            calls = [slope for one in everybody for slope in one.get(name, [])]
            slopes[name] = slopes[name] + torch.stack(calls).mean(0)
    return slopes


def times(without: Slopes, with_term: Slopes, wanted: Slopes, rate: float = 1.0) -> dict[str, list[float]]:
    """For each gate: how many times the term is in its update W − rate · gradient, and the relative distance from once."""
    found = {}
    for name, slope in wanted.items():
        change = (without[name].double() - with_term[name].double()) / rate
        found[name] = [float((change * slope).sum() / slope.square().sum()), float((change - slope).norm() / slope.norm())]
    return found


def gathered(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of all ranks, the gates of each; of a gate on several, the number farthest from one."""
    everybody: list[Any] = [found]
    if dist.is_initialized():
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, found)
    worst: dict[str, list[float]] = {}
    for one in everybody:
        for name, (count, error) in one.items():
            if name not in worst or error > worst[name][1]:
                worst[name] = [count, error]
    return worst
