"""From logits to combine weights and chosen experts: what every router does after its scores."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._precision import at_least_float32, full_precision
from .._rules import check_tensor, check_top_k

__all__ = ["Controller", "RouterOutput", "route"]


class RouterOutput(NamedTuple):
    """What a router returns for inputs `(*, D)`.

    logits: `(*, K)`, scores as the gate gives them, those of `PrototypeRouter` divided by its temperature; float32 or float64.
    probs: `(*, K)`, softmax of the logits over ALL experts, same dtype. The balance loss reads these.
    weights: `(*, top_k)`, or `(*, K)` for soft routing: combine weights, rows sum to one, in the dtype of the input.
    indices: the same shape, int64: the experts that the weights belong to, for soft routing 0 ... K-1, else in the order of the
        choice: best first, where no controller says otherwise.
    """

    logits: Tensor
    probs: Tensor
    weights: Tensor
    indices: Tensor


class Controller(Protocol):
    """What stands between gate and choice and says who may be chosen, such as `ImportanceConstraint` or `LossFreeBias`.

    Any object with these two methods is one; there is nothing to inherit from. `route` calls it with the logits, chooses by
    what it returns, and calls `observe` with what was chosen, in training and in evaluation. Rules for one of your own:

    - Make it an `nn.Module` with its state in buffers, so that it is moved, saved and loaded with its router, and knows
      `self.training`. Each router needs its own. `PrototypeRouter.reset_parameters` calls its `reset_parameters`, if any.
    - Change no argument in place, and count under `torch.no_grad()`: the weights carry a graph.
    - Under activation checkpointing a forward runs twice. The second one must return what the first one did, and count nothing.
    - Under data parallelism each rank sees its own tokens: to be equal on all ranks, a state needs an all-reduce.

    >>> class LastFirst(torch.nn.Module):
    ...     def forward(self, logits):
    ...         return logits.flip(-1)
    ...     def observe(self, weights, indices):
    ...         pass
    >>> route(torch.tensor([[0.0, 2.0, 1.0, 5.0]]), top_k=2, controller=LastFirst()).indices
    tensor([[0, 2]])
    """

    def __call__(self, logits: Tensor, /) -> Tensor:
        """Logits `(*, K)`, float32 or float64 -> the same shape: what the choice is made by; −inf closes an expert."""

    def observe(self, weights: Tensor, indices: Tensor, /) -> None:
        """Combine weights and chosen experts, both `(*, top_k)` or `(*, K)`; weights in float32 or float64."""


def route(
    logits: Tensor, top_k: int | None = None, *, controller: Controller | None = None, dtype: torch.dtype | None = None
) -> RouterOutput:
    """Combine weights and chosen experts of each token, from the logits of any gate.

        soft:   w = softmax(c(l))
        top-k:  w = softmax(l_S),  S = the top_k largest of c(l)

    c is the controller, or nothing. It decides who is chosen, not by how much: the weights of the chosen are those of the
    logits as they are. An expert that it closes (−inf) gets weight 0, even where fewer than `top_k` are open.

    **Shape**
        - logits: `(*, K)`, floating point.
        - Output: `RouterOutput`; logits and probs, the latter without the controller, in float32, or float64 if given.
          NaN in a row gives NaN weights in that row.

    Args:
        top_k: None is soft routing, all experts weighted; an integer in `[1, K]` keeps that many.
        controller: a module such as `ImportanceConstraint` or `LossFreeBias`, one a gate. Called with the logits, it returns
            what the choice is made by; then its `observe(weights, indices)` is called.
        dtype: of the weights; None is that of the logits.

    Raises:
        ValueError: `top_k` out of range, or logits without experts.
        TypeError: logits not floating point.

    Source:
        top-k gating: arXiv:1701.06538, without its noise.

    >>> logits, probs, weights, indices = route(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
    >>> indices, weights
    (tensor([[1, 2]]), tensor([[0.7311, 0.2689]]))
    """
    check_tensor(logits, "logits")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}; pass the scores of the gate")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (*, experts) with at least one expert, got shape {tuple(logits.shape)}")
    num_experts = logits.shape[-1]
    if top_k is not None:
        check_top_k(top_k, num_experts)
    with full_precision(logits.device):
        scores = at_least_float32(logits)
        probs = scores.softmax(-1)
        choice = scores if controller is None else controller(scores)
        if top_k is None:
            weights = probs if controller is None else choice.softmax(-1)
            indices = torch.arange(num_experts, device=logits.device).expand(probs.shape)
        else:
            best, indices = choice.topk(top_k, dim=-1)
            if controller is not None:
                best = scores.gather(-1, indices).masked_fill(best == -torch.inf, -torch.inf)
            # the chosen probs renormalised, with their own rounding only
            weights = best.softmax(-1)
        if controller is not None:
            controller.observe(weights, indices)
    return RouterOutput(scores, probs, weights.to(dtype or logits.dtype), indices)
