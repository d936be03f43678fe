"""What stands between gate and choice: hard constraints and a bias that balance the experts without a loss.

Over 250 lines: two controllers that keep one contract (counting, recomputation, precision), mostly docstring.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .._rules import check_tensor
from .formulas import expert_sums
from .ranks import over_ranks
from .recompute import Counting, remember

__all__ = ["ImportanceConstraint", "LossFreeBias"]


class ImportanceConstraint(Counting):
    """Closes, while training, the experts that have been used too much: hard constraints on the importance.

        I_i = Σ_t w_i(t),  Ī = Σ_i I_i / K
        "relative":  r_i ← r_i + (I_i − Ī) / Ī       after each step; closed where r_i > bound
        "mean":      a_i ← mean over steps of I_i / Σ_j I_j;         closed where a_i − 1/K > bound

    r_i is a running sum: an overused expert stays closed until it has given the excess back. Given to `PrototypeRouter` or
    `route`; a closed expert's logit becomes −inf, so it has no weight, and a gradient at most from a balance loss, which reads
    the probs without it. The one with the least excess is always open. In evaluation all experts are open and nothing is
    counted. Nothing is learned.

    **Shape**
        - Input: logits `(*, num_experts)`, floating point; output: the same, closed experts at −inf.
        - `observe`: weights and indices `(*, top_k)` or `(*, num_experts)`.

    Args:
        num_experts: K.
        bound: m, at least 0: how far above its fair share an expert may be before it is closed. One step can pass it by
            what is used in that step. The paper tries 0.1, 0.3 and 0.5 (relative), 0.1 and 0.3 (mean).
        kind: "relative" or "mean".
        momentum: for "mean": the least weight of the newest step, in `(0, 1]`, so that the mean forgets. None is the mean over
            all steps, as in the paper, whose late corrections are slow.
        sync: count the tokens of all ranks of the default process group, by one all-reduce of K numbers a step, so that every
            rank has the same experts open. All ranks must call it equally often, a rank without tokens too. Without a
            process group it changes nothing. False is for ranks that do not all run this router, as pipeline stages; under
            DDP with its default `broadcast_buffers=True` rank 0's state then replaces the others' at each forward.
        device: where the buffers are made.

    A step is a forward in training mode with gradients on, also of a micro-batch; under `no_grad`, as in a generation, nothing
    is counted. One without tokens, or with weights that are not finite, is not counted. Recomputation (activation
    checkpointing) is recognised: it sees the experts that were open in the last forward, and counts nothing, or, under
    reentrant checkpointing, whose first pass has no gradients, in its place. So run the backward of a checkpointed router
    before its next forward.
    With `torch.compile` and inductor, checkpoint what is compiled; inductor rejects a checkpoint inside. A selective policy may
    save matmuls and attention, but no operation that the controller runs too (scatter, sum, where and the like), which the
    recomputation leaves out. A graph exported in training mode holds the operation `spectral_router::first_forward`.

    NOTE[DIFF]: In the paper's code each process has a state of its own, which is lost with it; here it is saved, and counted
    over all ranks. `momentum` is not in the paper.

    Attributes:
        importance: buffer `(num_experts,)`: r or a. It stays in float32 or better.
        open: bool `(num_experts,)`: what the next training forward lets through.

    Raises:
        ValueError: an argument out of its range, or logits whose last dimension is not `num_experts`.

    Source:
        Pavlitska et al., arXiv:2204.10598.

    >>> from spectral_router import PrototypeRouter
    >>> router = PrototypeRouter(dim=16, num_experts=4, top_k=1, controller=ImportanceConstraint(4))
    >>> tokens = router.prototypes[[2, 2, 2, 0]].detach()
    >>> router(tokens).indices[:, 0]
    tensor([2, 2, 2, 0])
    >>> router.controller.importance, router.controller.open
    (tensor([ 0., -1.,  2., -1.]), tensor([ True,  True, False,  True]))
    """

    importance: Tensor
    steps: Tensor
    last_open: Tensor

    def __init__(
        self,
        num_experts: int,
        bound: float = 0.5,
        *,
        kind: Literal["relative", "mean"] = "relative",
        momentum: float | None = None,
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device)
        _check_num_experts(num_experts)
        if not 0 <= bound < math.inf:
            raise ValueError(f"bound must be a finite number of at least 0, got {bound=}")
        if kind not in ("relative", "mean"):
            raise ValueError(f'kind must be "relative" or "mean", got {kind=}')
        if momentum is not None and kind != "mean":
            raise ValueError(f'momentum belongs to kind="mean", got {momentum=}, {kind=}; leave it None')
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must be None or in (0, 1], got {momentum=}")
        self.num_experts = num_experts
        self.bound = bound
        self.kind = kind
        self.momentum = momentum
        self.sync = sync
        self.register_buffer("importance", _zeros(num_experts, device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device) if kind == "mean" else None)
        # what a recomputation sees; no checkpoint falls between a forward and its backward
        self.register_buffer("last_open", torch.ones(num_experts, dtype=torch.bool, device=device), persistent=False)

    @property
    def open(self) -> Tensor:
        """Which experts the next training forward lets through, bool `(num_experts,)`."""
        excess = self.importance if self.kind == "relative" else self.importance - 1 / self.num_experts
        return (excess <= self.bound) | (excess <= excess.amin())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all steps."""
        super().reset_parameters()
        self.last_open.fill_(True)

    def forward(self, logits: Tensor) -> Tensor:
        _check_logits(logits, self.num_experts)
        if not self.training:
            return logits
        if self.last_open.device != self.importance.device:  # load_state_dict(assign=True) has put only the latter in place
            self.last_open = torch.ones_like(self.last_open, device=self.importance.device)
        remember(self.last_open, self.open)
        return logits.masked_fill(~self.last_open, -math.inf)

    def observe(self, weights: Tensor, indices: Tensor) -> None:
        """Count the combine weights of one step; in training only."""
        if self.training and (first := self.counts(self.importance)) is not False:
            self._count(weights, indices, first)

    @torch.no_grad()
    def _count(self, weights: Tensor, indices: Tensor, first: bool | Tensor) -> None:
        total = _counted(weights, indices, self.num_experts, self.sync).to(self.importance.dtype)
        share = total / total.sum()
        counts = share.isfinite().all() & first  # without tokens: 0 / 0
        if self.kind == "relative":
            change = self.num_experts * share - 1
        else:
            self.steps.add_(counts)
            newest = self.steps.clamp_min(1).to(share.dtype).reciprocal().clamp_min(self.momentum or 0)
            change = newest * (share - self.importance)
        self.importance.add_(torch.where(counts, change, 0))

    def extra_repr(self) -> str:
        momentum = "" if self.momentum is None else f", momentum={self.momentum}"
        return f"num_experts={self.num_experts}, bound={self.bound}, kind={self.kind!r}{momentum}, sync={self.sync}"


class LossFreeBias(Counting):
    """A bias on the choice that rises for experts with little load and falls for those with much.

        choice = logits + b,    after each training step  b_i ← b_i + rate · sign(mean load − load_i)

    load_i is the number of tokens that chose expert i. The bias says who is chosen; the weights of the chosen are those of
    the logits without it. It acts in evaluation too, as a part of the trained router, and changes in training only. Nothing
    is learned by gradient.

    NOTE[DIFF]: The papers add the bias to sigmoid scores, which lie in (0, 1); here it is added to the logits of whatever
    gate, so `rate` is in units of logits. With `top_k=None`, which the papers do not have, nothing is chosen: there the
    bias is in the weights, and load_i is their sum. `top_k=num_experts` counts the same, but there no weight depends on it.

    **Shape**
        - Input: logits `(*, num_experts)`, floating point; output: the same, with the bias.
        - `observe`: weights and indices `(*, top_k)` or `(*, num_experts)`.

    Args:
        num_experts: K.
        rate: u, the change a step, above 0.
        sync, device: as in `ImportanceConstraint`; with `sync` the load is that of all ranks.

    Steps, those that are not counted, and recomputation are as in `ImportanceConstraint`.

    Attributes:
        bias: buffer `(num_experts,)`, b. It stays in float32 or better.

    Raises:
        ValueError: an argument out of its range, or logits whose last dimension is not `num_experts`.

    Source:
        algorithm 1 of arXiv:2408.15664; arXiv:2412.19437.

    >>> from spectral_router import PrototypeRouter
    >>> router = PrototypeRouter(dim=16, num_experts=4, top_k=1, controller=LossFreeBias(4))
    >>> _ = router(router.prototypes[[2, 2, 2, 0]].detach())
    >>> router.controller.bias
    tensor([ 0.0000,  0.0010, -0.0010,  0.0010])
    """

    bias: Tensor
    last_bias: Tensor

    def __init__(
        self, num_experts: int, rate: float = 1e-3, *, sync: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(device)
        _check_num_experts(num_experts)
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be a finite number above 0, got {rate=}")
        self.num_experts = num_experts
        self.rate = rate
        self.sync = sync
        self.register_buffer("bias", _zeros(num_experts, device))
        self.register_buffer("last_bias", _zeros(num_experts, device), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        _check_logits(logits, self.num_experts)
        if not self.training:
            return logits + self.bias
        if self.last_bias.device != self.bias.device:  # as in ImportanceConstraint
            self.last_bias = torch.zeros_like(self.bias)
        remember(self.last_bias, self.bias)
        return logits + self.last_bias

    def observe(self, weights: Tensor, indices: Tensor) -> None:
        """Count the tokens of one step; in training only."""
        if self.training and (first := self.counts(self.bias)) is not False:
            self._count(weights, indices, first)

    @torch.no_grad()
    def _count(self, weights: Tensor, indices: Tensor, first: bool | Tensor) -> None:
        if weights.shape[-1] < self.num_experts:
            weights = torch.where(weights.isfinite(), torch.ones_like(weights), math.nan)
        load = _counted(weights, indices, self.num_experts, self.sync).to(self.bias.dtype)
        counts = load.isfinite().all() & first
        self.bias.add_(torch.where(counts, (load.mean() - load).sign(), 0), alpha=self.rate)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, rate={self.rate}, sync={self.sync}"


def _check_num_experts(num_experts: int) -> None:
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts must be a whole number of at least 1, got {num_experts=}")


def _check_logits(logits: Tensor, num_experts: int) -> None:
    check_tensor(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] != num_experts:
        raise ValueError(f"the last dimension of the logits must be {num_experts=}, got shape {tuple(logits.shape)}")


def _zeros(num_experts: int, device: torch.device | str | None) -> Tensor:
    return torch.zeros(num_experts, device=device, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))


def _counted(values: Tensor, indices: Tensor, num_experts: int, sync: bool) -> Tensor:
    """(*, k) values of the chosen experts -> (K): each expert's own, summed over tokens and, if `sync`, over ranks."""
    # through (*, K): the order of the sum is fixed, which adding at indices would leave to chance on a GPU
    placed = values.new_zeros(*values.shape[:-1], num_experts).scatter(-1, indices, values)
    return over_ranks(expert_sums(placed, None), sync)
