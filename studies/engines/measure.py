"""Times: the change that the term makes to the optimizer's update of the gates, over the term's gradient by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty

PENALTY, BALANCE = 0.5, 20.0  # coefficients: both gradients are of a size that float32 shows
Slopes = dict[str, Tensor]
Score = Callable[[Tensor], Tensor]


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def sigmoid(logits: Tensor) -> Tensor:
    """Scores that do not compete, divided by their sum."""
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


class Call(NamedTuple):
    """One call of a gate."""

    tokens: Tensor  # (T, D)
    mask: Tensor | None  # (T,), True: no padding


def terms(kind: str) -> dict[str, Any]:
    """What `wrap_moe` is called with: one of the two alone. The penalty has no anchors, so that it is known by hand."""
    if kind == "penalty":
        return {"penalty": SpectralRankPenalty(1.0), "penalty_coef": PENALTY, "balance": None}
    return {"penalty": None, "balance_coef": BALANCE}


def penalty_slope(weight: Tensor) -> Tensor:
    """Gradient of equations 3 + 5 by an SVD in float64, (K, D)."""
    leaf = weight.detach().double().requires_grad_()
    sigmas = torch.linalg.svdvals(leaf)
    term = (sigmas[0] - 1) ** 2 + (sigmas.square().sum() / sigmas[0] ** 2 - min(leaf.shape)) ** 2
    return PENALTY * torch.autograd.grad(term, leaf)[0]


def balance_slope(weight: Tensor, call: Call, score: Score) -> Tensor:
    """Gradient of equation 6, (std / mean)² of the experts' mean probability, for one call of the gate on tokens (T, D)."""
    leaf = weight.detach().double().requires_grad_()
    tokens = call.tokens.double() if call.mask is None else call.tokens.double()[call.mask]
    share = score(tokens @ leaf.mT).mean(0)
    return BALANCE * torch.autograd.grad(share.var(correction=0) / share.mean() ** 2, leaf)[0]


@contextmanager
def listening(modules: dict[str, nn.Module], without_graph: bool = False) -> Iterator[dict[str, list[Call]]]:
    """What the gates get, one entry a call: tokens, and what a second argument says of padding.

    without_graph: also in calls without one, as the first pass of reentrant checkpointing is.
    """
    heard: dict[str, list[Call]] = {name: [] for name in modules}

    def hear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch._C._current_graph_task_id() == -1 and (without_graph or torch.is_grad_enabled()):  # no recomputation
                x = args[0].detach()
                x = (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()
                padding = args[1] if len(args) > 1 and isinstance(args[1], Tensor) and args[1].dtype == torch.bool else None
                mask = None if padding is None else ~padding.reshape(-1)
                heard[name].append(Call(x.reshape(-1, x.shape[-1]), mask))

        return hook

    hooks = [module.register_forward_pre_hook(hear(name)) for name, module in modules.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(
    kind: str,
    weights: Slopes,
    heard: dict[str, list[Call]],
    score: Score = softmax,
    counts: list[Any] | None = None,
) -> Slopes:
    """The term's gradient for each gate: the penalty's, or the mean of the balance's over all calls of all ranks.

    counts: of the tokens in the loss, by call of this rank, where an engine's mean is over these; None: calls count alike.
    """
    if kind == "penalty":
        return {name: penalty_slope(weight) for name, weight in weights.items()}
    own = {
        name: [
            (balance_slope(weights[name], call, score), counts[number] if counts else 1) for number, call in enumerate(calls)
        ]
        for name, calls in heard.items()
        if name in weights
    }
    everybody: list[Any] = [own]
    if dist.is_initialized():
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, own)
    slopes = {}
    for name in weights:
        calls = [entry for one in everybody for entry in one.get(name, [])]
        slopes[name] = sum(slope * count for slope, count in calls) / sum(count for _, count in calls)
    return slopes


def elsewhere(parts: Iterable[nn.Module], gates: dict[str, Any]) -> list[Tensor]:
    """This rank's part of all parameters but the gates', copied."""
    own = {id(parameter) for gate in gates.values() for parameter in gate.parameters()}
    left = [p.detach() for part in parts for p in part.parameters() if id(p) not in own]
    return [(p.to_local() if hasattr(p, "to_local") else p).clone() for p in left]


def same(without: list[Tensor], with_term: list[Tensor]) -> None:
    """At the step nothing but the gates moves otherwise: outputs, loss and gradients were the same bit for bit."""
    different = sum(not torch.equal(a, b) for a, b in zip(without, with_term, strict=True))
    if different:
        raise AssertionError(f"{different} parameters that are no gates have been updated otherwise")


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
