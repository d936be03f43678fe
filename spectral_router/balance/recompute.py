"""Whether a forward is the second of activation checkpointing, which must see what the first saw and count nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def first_forward(like: Tensor) -> bool | Tensor:
    """Whether this forward runs outside of any backward; while compiling a bool scalar on the device of `like`.

    A compiled forward is traced once and may run in both places, and the compiler's own recomputation is a copy of the
    forward's operations in the backward. So there the question is an operation, asked whenever it runs.
    """
    return torch.ops.spectral_router.first_forward(like) if torch.compiler.is_compiling() else _outside()


def remember(last: Tensor, now: Tensor) -> None:
    """Keep in the buffer `last` what a first forward sees; then it holds what this forward must see, first or not."""
    first = first_forward(last)
    if isinstance(first, Tensor):
        last.copy_(torch.where(first, now, last))
    elif first:
        last.copy_(now)


def _outside() -> bool:
    return torch._C._current_graph_task_id() == -1


def _ask(like: Tensor) -> Tensor:
    return torch.full((), _outside(), dtype=torch.bool, device=like.device)


if not hasattr(torch.ops.spectral_router, "first_forward"):  # a reload finds it
    # for every device, that of fake tensors too; torch.library.custom_op takes some ms more of the import
    torch.library.define("spectral_router::first_forward", "(Tensor like) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl("spectral_router::first_forward", "default", _ask)
