"""What a batch tells of the gates of a model: margins, radii, flips under rounding, load. `MoEHandle.report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._rules import check_top_k
from .._sharding import whole
from ..gates.gate import Gate, first_tokens
from ..routing.prototypes import PrototypeRouter
from ..routing.radius import choice_radius
from ..routing.rounding import flipped_shares

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COUNT = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "experts_per_token", "topk")


@torch.no_grad()
def examine(model: nn.Module, gates: list[Gate], batch: Any, top_k: int | None = None) -> dict[str, dict[str, Any]]:
    """For each gate that runs, what `MoEHandle.report` says; the model is run once, in evaluation, and left as it was."""
    seen: dict[int, list[tuple[Tensor | None, Tensor]]] = {}
    inputs: dict[int, Tensor] = {}

    def entered(number: int, gate: Gate) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                inputs[number] = first_tokens(args, kwargs, gate.dim).detach()
            except ValueError:  # no tokens of the matrix's width: what it multiplies is made inside
                inputs.pop(number, None)

        return hook

    def left(number: int, gate: Gate) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            scores = gate.read(args, kwargs, output, logits=gate.has_logits).detach()
            tokens = inputs.pop(number, None)
            if tokens is not None and gate.index is not None:
                tokens = tokens[gate.index]
            flat = None if tokens is None else tokens.reshape(-1, gate.dim)
            scores = scores.reshape(-1, gate.num_experts)
            seen.setdefault(number, []).append((flat if flat is not None and len(flat) == len(scores) else None, scores))

        return hook

    training = [module for module in model.modules() if module.training]
    hooks = []
    try:
        for number, gate in enumerate(gates):
            # the layer that holds the matrix sees what is multiplied by it, if it is called
            hooks.append(gate.module.register_forward_pre_hook(entered(number, gate), with_kwargs=True, prepend=True))
            if gate.owner is not gate.module:
                hooks.append(gate.owner.register_forward_pre_hook(entered(number, gate), with_kwargs=True))
            hooks.append(gate.module.register_forward_hook(left(number, gate), with_kwargs=True, prepend=True))
        model.eval()
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    if not seen:
        raise RuntimeError(
            f"no gate of {type(model).__name__} ran on this batch as far as hooks tell; ask the model itself, not what "
            "torch.compile made of it"
        )
    return {gates[number].name: _told(model, gates[number], calls, top_k) for number, calls in sorted(seen.items())}


def _told(model: nn.Module, gate: Gate, calls: list[tuple[Tensor | None, Tensor]], top_k: int | None) -> dict[str, Any]:
    scores = torch.cat([part for _, part in calls])
    parts = [part for part, _ in calls if part is not None]
    tokens = torch.cat(parts) if len(parts) == len(calls) else None
    count = top_k if top_k is not None else _experts_a_token(model, gate)
    check_top_k(count, gate.num_experts)
    best = scores.topk(min(count + 1, gate.num_experts), dim=-1)
    chosen = torch.zeros_like(scores).scatter(-1, best.indices[:, :count], 1.0)
    probs = gate.score(scores) if gate.has_logits else scores
    report: dict[str, Any] = {
        "tokens": len(scores),
        "top_k": count,
        "load": (chosen.mean(0) / count).tolist(),
        "probability": probs.mean(0).tolist(),
        "coactivation": (chosen.mT @ chosen / len(chosen)).tolist(),
        "margin": _quantiles(best.values[:, count - 1] - best.values[:, -1]) if count < gate.num_experts else None,
        "radius": None,
        "relative_radius": None,
        "flips": None,
    }
    weight = whole(gate.weight).detach().float()
    if tokens is None or len(weight) != gate.num_experts:  # several rows an expert, as of heads
        return report
    if isinstance(gate.module, PrototypeRouter):
        radius = choice_radius(tokens, weight, count, metric=gate.module.metric)
        flips = None
    else:
        logits = gate.logits(tokens)
        if not (gate.has_logits and _increasing(logits, scores)):
            return report  # the logits are more than W x + b of what was seen
        bias = getattr(gate.owner, "bias", None)
        bias = whole(bias).detach().float() if isinstance(bias, Tensor) and bias.shape == (gate.num_experts,) else None
        radius = choice_radius(tokens, weight, count, bias=bias)
        flips = flipped_shares(tokens, weight, count, bias)
    length = tokens.float().norm(dim=-1).clamp_min(1e-30)
    return report | {"radius": _quantiles(radius), "relative_radius": _quantiles(radius / length), "flips": flips}


def _increasing(linear: Tensor, scores: Tensor) -> bool:
    """Whether the scores put the experts in the order of W x + b, for nearly all tokens: equal, scaled or soft-capped."""
    best = scores.argmax(-1, keepdim=True)
    top = linear.amax(-1, keepdim=True)
    close = (top - linear.gather(-1, best)).abs() <= 2e-2 * linear.abs().amax(-1, keepdim=True) + 1e-6
    return bool(close.float().mean() > 0.99)


def _quantiles(values: Tensor) -> dict[str, float]:
    finite = values[values.isfinite()].double()
    if not len(finite):
        return {f"{q:.0%}": float("inf") for q in _QUANTILES}
    steps = torch.tensor(_QUANTILES, dtype=torch.float64, device=finite.device)
    # torch.quantile takes 16 million at most
    told = torch.quantile(finite[: 2**23], steps).tolist()
    return {f"{q:.0%}": value for q, value in zip(_QUANTILES, told, strict=True)}


def _experts_a_token(model: nn.Module, gate: Gate) -> int:
    """As the gate says, else the module around it, else the model's config or a part of it."""
    around = next((module for module in model.modules() if gate.module in module.children()), None)
    config = getattr(model, "config", None)
    parts = [part for part in vars(config).values() if hasattr(part, "to_dict")] if hasattr(config, "to_dict") else []
    for holder in (gate.module, gate.owner, around, config, *parts):
        for name in _COUNT:
            value = getattr(holder, name, None)
            if type(value) is int and 1 <= value <= gate.num_experts:
                return value
    raise ValueError(f"nothing says to how many experts gate {gate.name!r} sends a token; give top_k=")
