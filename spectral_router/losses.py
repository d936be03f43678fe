"""What reads router probabilities. A balance loss is any callable (probs, mask=None) -> scalar, unweighted."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from . import functional

__all__ = ["LoadBalanceLoss"]


class LoadBalanceLoss(nn.Module):
    """Squared coefficient of variation of the experts' mean probability; a module over `functional.load_balance_loss`.

    Call it once a layer and add the results up: pooling layers first lets opposite imbalances cancel. Equation 7 of the
    paper has one L_div and does not say of which layer.

    **Shape**
        - probs: `(*, K)`, over all experts; mask: `(*)` bool or 0/1, or None.
        - Output: scalar, unweighted, in `[0, K - 1]` (`[0, K]` if `unbiased`).

    Args:
        unbiased: divide the variance by K - 1 instead of K.
        sync: P is the mean over the tokens of all ranks of the default process group, so the value is the same on each,
            that of the whole global batch. Without a process group it changes nothing.

    NOTE[SYNC]: CV² is not linear in P: without `sync`, each rank balances its own share of the batch, which asks for more than
    a balanced batch. With it, one all-reduce of K numbers runs in forward and none in backward. Each rank's gradient is that of
    its own tokens, times the number of ranks, so that the mean which DDP, FSDP and ZeRO take over ranks is the gradient of
    the global batch; where gradients are summed over ranks, divide the loss by their number. Ranks that repeat
    tokens, as in tensor parallelism, change nothing. All ranks must call it equally often, and a rank without tokens
    calls it too: a gate that runs on some ranks only would hang the rest.

    Raises:
        ValueError, TypeError: as `functional.load_balance_loss`.

    Source:
        equation 6 of arXiv:2601.03889.

    >>> import torch
    >>> LoadBalanceLoss()(torch.tensor([[0.75, 0.25]]))
    tensor(0.2500)
    """

    def __init__(self, *, unbiased: bool = False, sync: bool = False) -> None:
        super().__init__()
        self.unbiased = unbiased
        self.sync = sync

    def forward(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.sync and dist.is_available() and dist.is_initialized():
            # the loss depends on shares only: the sum over all tokens stands for them
            probs, mask = _sum_over_ranks(functional.expert_sums(probs, mask)), None
        return functional.load_balance_loss(probs, mask, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"unbiased={self.unbiased}" + (", sync=True" if self.sync else "")


def _sum_over_ranks(local: Tensor) -> Tensor:
    """The sum, with the gradient of `local` times the number of ranks."""
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (local - local.detach())
