"""Whether a forward is the second of activation checkpointing, which must see what the first saw and count nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def first_forward(like: Tensor) -> bool | Tensor:
    """Whether this forward runs outside of any backward; while compiling a bool scalar on the device of `like`.

    A compiled forward is traced once and may run in both places, and the compiler's own recomputation is a copy of the
    forward's operations in the backward. So there the question is an operation, asked whenever it runs.
    """
    return _ask(like) if torch.compiler.is_compiling() else _outside()


def remember(last: Tensor, now: Tensor) -> None:
    """Keep in the buffer `last` what a first forward sees; then it holds what this forward must see, first or not."""
    first = first_forward(last)
    if isinstance(first, Tensor):
        last.copy_(torch.where(first, now, last))
    elif first:
        last.copy_(now)


def _outside() -> bool:
    return torch._C._current_graph_task_id() == -1


@torch.library.custom_op("spectral_router::first_forward", mutates_args=())
def _ask(like: Tensor) -> Tensor:
    return torch.full((), _outside(), dtype=torch.bool, device=like.device)


@_ask.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)
