"""State that each training forward moves once, however often activation checkpointing runs it, and no generation moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._precision import keep_precision


class Counting(nn.Module):
    """A module whose training forwards move its buffers.

    A forward counts if gradients are on and it is the first. Under reentrant checkpointing the first has none: there the second
    pass, in the backward, counts. So a generation in training mode, whose forwards have no backward, counts nothing.
    """

    waiting: Tensor

    def __init__(self, device: torch.device | str | None) -> None:
        super().__init__()
        # first passes without gradients, whose second may come: eager ones, and compiled ones
        self._waiting = 0
        self.register_buffer("waiting", torch.zeros((), dtype=torch.int32, device=device), persistent=False)

    def counts(self, like: Tensor) -> bool | Tensor:
        """Whether this forward counts; while compiling a bool scalar on the device of `like`."""
        first = first_forward(like)
        if self.waiting.device != like.device:  # load_state_dict(assign=True) has put only the state in place
            self.waiting = torch.zeros_like(self.waiting, device=like.device)
        if isinstance(first, Tensor):
            if not torch.is_grad_enabled():
                self.waiting.add_(first)
                return False
            counts = first | (self.waiting > 0)
            self.waiting.copy_(torch.where(first, 0, (self.waiting - 1).clamp_min(0)))
            return counts
        if not torch.is_grad_enabled():
            self._waiting += first
            return False
        counted = first or self._waiting > 0
        self._waiting = 0 if first else max(self._waiting - 1, 0)
        return counted

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all steps."""
        self._waiting = 0
        for buffer in self.buffers():
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to(device)` moves the buffers; `.half()` leaves them in full precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_precision(self, before)
        return self


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
