"""Values that a matrix is held at: what was measured when it was first seen. Buffers, with not-a-number for "not seen yet"."""

from __future__ import annotations

import torch
from torch import Tensor


def held_at(anchors: Tensor | None, members: slice, now: Tensor) -> Tensor:
    """(B,): the anchors of the matrices at `members`; those not seen yet, or seen with NaN entries only, take what they are
    now, zero matrices 1, and keep it."""
    seen = torch.where(now == 0, 1, now).detach()
    if anchors is None:  # first seen in inference mode, where nothing is kept
        return seen
    anchor = anchors[members].to(now)
    anchor = torch.where(anchor.isnan(), seen, anchor)
    if not keeps_nothing():
        anchors[members].copy_(anchor)
    return anchor


def none_yet(count: int, like: list[Tensor]) -> Tensor:
    """(count,): room for the anchors of matrices such as these, float64 if any of them is."""
    dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in like) else torch.float32
    return torch.full((count,), float("nan"), dtype=dtype, device=like[0].device)


def drift(anchors: Tensor | None, members: slice, now: Tensor) -> Tensor:
    """(B,): by what share of its anchor each value has moved; NaN where there is none."""
    return torch.full_like(now, float("nan")) if anchors is None else now / anchors[members].to(now) - 1


def keeps_nothing() -> bool:
    """Where nothing may be kept. A buffer made in inference mode could never be updated in training, one made of what a
    `torch.func` transform passes in would outlive it. Dynamo cannot ask."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_inference_mode_enabled() or torch._C._functorch.maybe_current_level() is not None
