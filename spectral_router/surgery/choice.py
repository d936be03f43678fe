"""Which experts a gate chose in a forward, and with what weights: read from what the gate, its router or the experts get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gates.gate import Gate

_TOP_K = re.compile(
    r"(moe_|router_)?(top_?k|k)|(num_)?experts_per_(tok|token)|(num_|n_)?(selected|active|activated)_experts|top_k_experts"
)


class Choice(NamedTuple):
    """For each token and expert: whether it was chosen, and its weight, (tokens, experts). `soft`: all take part in all."""

    chosen: Tensor
    weights: Tensor
    soft: bool


def choice_in(values: Any, tokens: int, experts: int) -> Choice | None:
    """A choice handed out: indices (and weights) of the k chosen, or sparse scores, or a mask; None where there is none."""
    tensors = [t.detach() for t in _tensors(values) if t.ndim and t.numel() and t.numel() % tokens == 0]
    wholes = [t for t in tensors if not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool]
    floats = [t for t in tensors if t.is_floating_point()]
    for whole in wholes:
        indices = whole.reshape(tokens, -1).long()
        width = indices.shape[1]
        fits = whole.shape[-1] == width or (width == 1 and whole.ndim <= 2)
        if not (fits and width <= experts and indices.min() >= 0 and indices.max() < experts):
            continue
        if width > 1 and (indices.sort(-1).values.diff(dim=-1) == 0).any():
            continue
        # of several as wide, as where all are chosen, the weights are next to the indices
        place = next(number for number, tensor in enumerate(tensors) if tensor is whole)
        alike = [n for n, t in enumerate(tensors) if t.is_floating_point() and t.shape == whole.shape]
        beside = tensors[min(alike, key=lambda n: (abs(n - place), n))] if alike else None
        if beside is None and width == 1 and experts > 1 and whole.numel() == experts:
            continue  # as many numbers as experts: counts of tokens
        chosen = _spread(torch.ones_like(indices, dtype=torch.bool), indices, experts)
        weights = chosen.float() if beside is None else _spread(beside.reshape(tokens, -1).float(), indices, experts)
        return Choice(chosen, weights, width == experts)
    for scores in floats:
        dense = _dense(scores, tokens, experts)
        if dense is not None and (dense >= 0).all() and (dense == 0).any() and (dense > 0).any():
            return Choice(dense > 0, dense.float(), soft=False)
    for mask in tensors:
        dense = _dense(mask, tokens, experts) if not mask.is_floating_point() else None
        if dense is not None and ((dense == 0) | (dense == 1)).all() and (dense == 0).any():
            return Choice(dense != 0, (dense != 0).float(), soft=False)
    return None


def _spread(values: Tensor, indices: Tensor, experts: int) -> Tensor:
    return values.new_zeros(len(values), experts).scatter(-1, indices, values)


def _dense(tensor: Tensor, tokens: int, experts: int) -> Tensor | None:
    """(tokens, experts), also of (*, experts, capacity)."""
    if tensor.shape[-1] == experts and tensor.numel() == tokens * experts:
        return tensor.reshape(tokens, experts)
    if tensor.ndim > 2 and tensor.shape[-2] == experts and tensor.shape[:-2].numel() == tokens:
        return tensor.flatten(0, -3).amax(-1) if tensor.dtype != torch.bool else tensor.flatten(0, -3).any(-1)
    return None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def choice_by_score(gate: Gate, scores: Tensor, top_k: int | None) -> Choice:
    """The top k of a gate's probabilities (tokens, K); all experts for None."""
    if gate.scoring == "product_keys":
        rows, columns = (2 * scores).chunk(2, -1)
        scores = (rows[:, :, None] * columns[:, None, :]).flatten(1)
    if top_k is None or top_k >= scores.shape[-1]:
        return Choice(torch.ones_like(scores, dtype=torch.bool), scores, soft=True)
    weights, indices = scores.topk(top_k, -1)
    chosen = _spread(torch.ones_like(indices, dtype=torch.bool), indices, scores.shape[-1])
    return Choice(chosen, _spread(weights, indices, scores.shape[-1]), soft=False)


def stated_top_k(modules: Iterable[nn.Module]) -> int | None:
    """k as an attribute, the name of a class or a config says it, nearest first."""
    modules = list(modules)
    for module in modules:
        if found := re.search(r"top_?(\d+)", type(module).__name__, re.I):
            return int(found[1])
        for key, value in vars(module).items():
            if type(value) is int and value > 0 and _TOP_K.fullmatch(key.lower()):
                return value
    for module in modules:
        for holder in (vars(module).get("config"), vars(module).get("args")):
            for key, value in getattr(holder, "__dict__", {}).items():
                if type(value) is int and value > 0 and _TOP_K.fullmatch(key.lower()) and key != "top_k":
                    return value
    return None
