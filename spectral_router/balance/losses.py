"""What reads a router's probabilities, or logits. A balance loss is any callable (probs, mask=None) -> scalar, unweighted.

One with the attribute `reads = "logits"` is called with the logits instead.
"""

from __future__ import annotations

from torch import Tensor, nn

from .._rules import check_top_k
from . import formulas
from .ranks import over_ranks

__all__ = ["ImportanceKLLoss", "LoadBalanceLoss", "MutualInformationLoss", "RouterZLoss", "SwitchLoss"]


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
    a balanced batch. With it, one all-reduce of K numbers runs in forward. Each rank's gradient is that of its own tokens,
    times the number of ranks, so that the mean which DDP, FSDP and ZeRO take is the gradient of the global batch;
    where gradients are summed, divide the loss by the number of ranks. Ranks that repeat tokens, as in tensor parallelism,
    change nothing. All ranks must call it equally often, one without tokens too.

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
        return formulas.squared_variation(over_ranks(formulas.expert_sums(probs, mask), self.sync), self.unbiased)

    def extra_repr(self) -> str:
        return f"unbiased={self.unbiased}" + (", sync=True" if self.sync else "")


class ImportanceKLLoss(nn.Module):
    """Kullback-Leibler divergence of the experts' shares from even ones; a module over `functional.importance_kl_loss`.

    **Shape**
        - probs: `(*, K)`, over all experts; mask: `(*)` bool or 0/1, or None.
        - Output: scalar, unweighted, in `[0, log K]`.

    Args:
        sync: the shares are those of the tokens of all ranks, exactly as in `LoadBalanceLoss`, whose NOTE[SYNC] holds.

    Raises:
        ValueError, TypeError: as `functional.importance_kl_loss`.

    Source:
        arXiv:2204.10598, whose coefficient is 0.5.

    >>> import torch
    >>> ImportanceKLLoss()(torch.tensor([[0.75, 0.25]]))  # 0.75 log 1.5 + 0.25 log 0.5
    tensor(0.1308)
    """

    def __init__(self, *, sync: bool = False) -> None:
        super().__init__()
        self.sync = sync

    def forward(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        return formulas.divergence(over_ranks(formulas.expert_sums(probs, mask), self.sync))

    def extra_repr(self) -> str:
        return "sync=True" if self.sync else ""


class MutualInformationLoss(nn.Module):
    """Minus the mutual information of token and expert; a module over `functional.mutual_information_loss`.

    Balance losses alone are content with even routing of every token; this one also wants each token sure of its expert.

    **Shape**
        - probs: `(*, K)`, over all experts; mask: `(*)` bool or 0/1, or None.
        - Output: scalar, unweighted, in `[-log K, 0]` up to rounding.

    Args:
        sync: the tokens are those of all ranks, exactly as in `LoadBalanceLoss`, whose NOTE[SYNC] holds.

    Raises:
        ValueError, TypeError: as `functional.mutual_information_loss`.

    Source:
        arXiv:2509.05086.

    >>> import torch
    >>> MutualInformationLoss()(torch.eye(4))  # -log 4
    tensor(-1.3863)
    """

    def __init__(self, *, sync: bool = False) -> None:
        super().__init__()
        self.sync = sync

    def forward(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        return formulas.minus_information(over_ranks(formulas.entropy_sums(probs, mask), self.sync))

    def extra_repr(self) -> str:
        return "sync=True" if self.sync else ""


class SwitchLoss(nn.Module):
    """The balance loss of GShard and Switch, load times probability; a module over `functional.switch_loss`.

    **Shape**
        - probs: `(*, K)`, over all experts; mask: `(*)` bool or 0/1, or None.
        - Output: scalar, unweighted, in `[0, K / top_k]`, 1 at balance.

    Args:
        top_k: how many experts a token is sent to, from 1 to K.
        sync: the tokens are those of all ranks, exactly as in `LoadBalanceLoss`, whose NOTE[SYNC] holds.

    Raises:
        ValueError, TypeError: as `functional.switch_loss`.

    Source:
        arXiv:2101.03961, whose coefficient is 1e-2; arXiv:2006.16668. `sync`: Qiu et al., arXiv:2501.11873, sum the load only.

    >>> import torch
    >>> SwitchLoss(top_k=2)(torch.tensor([[0.5, 0.25, 0.25, 0.0]]))  # 4 x (0.5 x 0.5 + 0.5 x 0.25)
    tensor(1.5000)
    """

    def __init__(self, top_k: int = 1, *, sync: bool = False) -> None:
        super().__init__()
        check_top_k(top_k)
        self.top_k = top_k
        self.sync = sync

    def forward(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        sums = over_ranks(formulas.assignment_sums(probs, mask, self.top_k), self.sync)
        return formulas.load_times_probability(sums, self.top_k)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}" + (", sync=True" if self.sync else "")


class RouterZLoss(nn.Module):
    """Mean square of the logsumexp of the logits; a module over `functional.router_z_loss`.

    It reads logits: `wrap_moe(model, balance=RouterZLoss())` hands it those of each gate. To have it beside a balance loss,
    give a function of both, with the same attribute:

    >>> import torch
    >>> from spectral_router import functional
    >>> def balance(logits, mask=None):
    ...     even = functional.load_balance_loss(logits.softmax(-1), mask)
    ...     return even + 0.1 * functional.router_z_loss(logits, mask)
    >>> balance.reads = "logits"  # wrap_moe(model, balance=balance)

    Caution: not for the unsquared distances of `PrototypeRouter(metric="euclidean")`, the default; see
    `functional.router_z_loss`.

    It needs no `sync`: a mean over tokens is linear in them. Where ranks hold unequally many, a token on a rank with few weighs
    more, as in a task loss that each rank averages.

    **Shape**
        - logits: `(*, K)`, over all experts; mask: `(*)` bool or 0/1, or None.
        - Output: scalar, unweighted, at least 0.

    Raises:
        ValueError, TypeError: as `functional.router_z_loss`.

    Source:
        arXiv:2202.08906, whose coefficient is 1e-3.

    >>> RouterZLoss()(torch.zeros(3, 2))  # (log 2)²
    tensor(0.4805)
    """

    reads = "logits"

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        return formulas.router_z_loss(logits, mask)
