"""Rounding to fewer bits, as training and serving do it, and which choices it changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _fp8(tensor: Tensor) -> Tensor:
    scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


def _int8(tensor: Tensor) -> Tensor:
    scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (tensor / scale).round().clamp(-127, 127) * scale


# each row, of weights or of tokens, with a scale of its own, as inference engines have it; fp8 is e4m3
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda tensor: tensor.bfloat16().to(tensor.dtype),
    "fp8": _fp8,
    "int8": _int8,
}


@torch.no_grad()
def flipped_shares(tokens: Tensor, weight: Tensor, top_k: int, bias: Tensor | None = None) -> dict[str, float]:
    """By format, the share of tokens (T, D) whose set of experts changes when tokens and weight (K, D) are rounded to it.

    Products and sums stay in float32, as they do in the accumulators of matrix units.
    """

    def chosen(x: Tensor, w: Tensor) -> Tensor:
        logits = x @ w.mT if bias is None else x @ w.mT + bias
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)

    x, w = tokens.float(), weight.float()
    usual = chosen(x, w)
    return {
        name: (chosen(rounded(x), rounded(w)) != usual).any(-1).float().mean().item() for name, rounded in ROUNDINGS.items()
    }
