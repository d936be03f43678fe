"""Rows of a gate that moved, by training or rounding, and are still their own expert's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.rounding import ROUNDINGS


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
