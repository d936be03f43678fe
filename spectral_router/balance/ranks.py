"""Sums over the ranks of a distributed job."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def over_ranks(local: Tensor, sync: bool) -> Tensor:
    """With `sync`, the sum over all ranks of the default process group, with the gradient of `local` times their number."""
    if not (sync and dist.is_available() and dist.is_initialized()):
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (local - local.detach()) if local.requires_grad else total
