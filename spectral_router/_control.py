"""What the controllers share: checks, and the counts of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ._balance import expert_sums
from ._ranks import over_ranks


def check_num_experts(num_experts: int) -> None:
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts must be a whole number of at least 1, got {num_experts=}")


def check_logits(logits: Tensor, num_experts: int) -> None:
    if logits.ndim < 1 or logits.shape[-1] != num_experts:
        raise ValueError(f"the last dimension of the logits must be {num_experts=}, got shape {tuple(logits.shape)}")


def zeros(num_experts: int, device: torch.device | str | None) -> Tensor:
    return torch.zeros(num_experts, device=device, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))


def counted(values: Tensor, indices: Tensor, num_experts: int, sync: bool) -> Tensor:
    """(*, k) values of the chosen experts -> (K): each expert's own, summed over tokens and, if `sync`, over ranks."""
    # through (*, K): the order of the sum is fixed, which adding at indices would leave to chance on a GPU
    placed = values.new_zeros(*values.shape[:-1], num_experts).scatter(-1, indices, values)
    return over_ranks(expert_sums(placed, None), sync)
