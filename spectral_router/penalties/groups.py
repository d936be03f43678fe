"""What penalties of many matrices share: groups of one shape, their terms put together, measurements in full precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_matrices(weight: Tensor) -> None:
    """A clear error for what is no `(*, m, n)` of a floating dtype."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}; of a module pass .weight")
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise ValueError(f"weight must hold matrices, shape (*, m, n) with m, n >= 1, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}; dequantise or convert it first")


def by_shape(weights: list[Tensor]) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Matrices of one shape, dtype and device together, in the order of first appearance, and their positions."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    positions: dict[tuple[Any, ...], list[int]] = {}
    for position, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights must be tensors, got {type(weight).__name__} at position {position}; pass module.weight")
        if weight.ndim < 2:
            raise ValueError(f"weights must be matrices (experts, dim), got shape {tuple(weight.shape)} at position {position}")
        kind = (weight.shape, weight.dtype, weight.device)
        groups.setdefault(kind, []).append(weight)
        positions.setdefault(kind, []).append(position)
    if not groups:
        raise ValueError("weights must hold at least one matrix, got none")
    for group in groups.values():
        check_matrices(group[0])
    return list(groups.values()), list(positions.values())


def matrices_in(group: list[Tensor]) -> int:
    """How many matrices a group of tensors (*, K, d) of one shape holds."""
    return len(group) * math.prod(group[0].shape[:-2])


def total(terms: list[Tensor]) -> Tensor:
    """The sum over groups and matrices; the groups may live on several devices."""
    sums = [term.sum() for term in terms]
    return torch.stack([part.to(sums[0].device) for part in sums]).sum() if len(sums) > 1 else sums[0]


def in_order(terms: list[Tensor], positions: list[list[int]]) -> list[Tensor]:
    """The term of each matrix, in the order in which the matrices came."""
    parts = {place: part for term, group in zip(terms, positions, strict=True) for place, part in zip(group, term, strict=True)}
    return [parts[place] for place in range(len(parts))]


def as_matrix(weight: Tensor) -> Tensor:
    """(out, in, *kernel) -> (out, in * prod(kernel))."""
    return weight.flatten(1) if isinstance(weight, Tensor) and weight.ndim > 2 else weight
