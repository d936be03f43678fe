"""What rounding to fewer bits does to the rows of a gate."""

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


# each row, of weights or of tokens, with a scale of its own, as inference engines have it
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda tensor: tensor.bfloat16().to(tensor.dtype),
    "fp8": _fp8,
    "int8": _int8,
}


def certified(moved: Tensor, distances: Tensor) -> Tensor:
    """(K,) moves and (K, K) distances -> (K,), whether each row moved by less than half its distance to every other.

    Such a row is still nearer to its own old place than to any other's: ‖W'_i − W_j‖ ≥ ‖W_i − W_j‖ − ‖W'_i − W_i‖ >
    ‖W'_i − W_i‖.

    >>> certified(torch.tensor([0.4, 0.6]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([ True, False])
    """
    others = distances + torch.diag(torch.full((len(distances),), torch.inf))
    return moved < others.amin(-1) / 2


@torch.no_grad()
def certified_shares(weight: Tensor, distances: Tensor) -> dict[str, float]:
    """By format, the share of rows that rounding cannot make another expert's."""
    return {
        name: certified((rounded(weight) - weight).norm(dim=-1), distances).float().mean().item()
        for name, rounded in ROUNDINGS.items()
    }
