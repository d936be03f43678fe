"""What reads router probabilities. A balance loss is any callable (probs, mask=None) -> scalar, unweighted."""

from __future__ import annotations

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

    Raises:
        ValueError, TypeError: as `functional.load_balance_loss`.

    Source:
        equation 6 of arXiv:2601.03889.

    >>> import torch
    >>> LoadBalanceLoss()(torch.tensor([[0.75, 0.25]]))
    tensor(0.2500)
    """

    def __init__(self, *, unbiased: bool = False) -> None:
        super().__init__()
        self.unbiased = unbiased

    def forward(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.load_balance_loss(probs, mask, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"unbiased={self.unbiased}"
