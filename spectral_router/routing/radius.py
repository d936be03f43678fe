"""How far a token is from another choice of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import at_least_float32, full_precision
from .._rules import check_tensor, check_top_k

_AT_ONCE = 2**24  # entries of (tokens, top_k, experts)
_METRICS = ("dot", "euclidean", "sqeuclidean", "cosine")


@torch.no_grad()
def choice_radius(tokens: Tensor, weight: Tensor, top_k: int = 1, *, bias: Tensor | None = None, metric: str = "dot") -> Tensor:
    """The largest change of a token, in the Euclidean norm, that cannot change the set of experts it is sent to.

        r(x) = min over chosen i and others j of (l_i − l_j) / ‖W_i − W_j‖,    l = W x + b

    Exact: within the ball every chosen logit stays above every other, and at distance r, along W_j − W_i, two are equal. For
    prototypes the same with the planes between them (the Voronoi form), (‖x − W_j‖² − ‖x − W_i‖²) / (2 ‖W_i − W_j‖). Softmax
    and sigmoid keep the order of the logits, so they do not matter; a selection bias, noise and groups do, and are not in it.

    **Shape**
        - tokens: `(*, D)`; weight: `(K, D)`; floating point.
        - Output: `(*)`, float32 or float64, at least 0; 0 on a tie; inf if all experts are chosen, or no plane parts them.

    Args:
        tokens: x, what the matrix is multiplied by.
        weight: W, one row an expert, or its prototype.
        top_k: k, experts a token.
        bias: b, `(K,)`, for "dot".
        metric: "dot"; "euclidean" and "sqeuclidean", which choose alike; "cosine", that of x and W_i.

    Raises:
        ValueError: top_k is not in [1, K], the metric is not known, or shapes do not fit.

    >>> choice_radius(torch.tensor([3.0, 0.0]), torch.eye(2))  # to the diagonal
    tensor(2.1213)
    """
    check_tensor(tokens, "tokens")
    check_tensor(weight, "weight")
    check_top_k(top_k, len(weight))
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric=}")
    if weight.ndim != 2 or tokens.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"tokens (*, D) and a weight (K, D) are needed, got {tuple(tokens.shape)} and {tuple(weight.shape)}")
    rows, flat = at_least_float32(weight), at_least_float32(tokens).reshape(-1, tokens.shape[-1])
    dtype = torch.promote_types(rows.dtype, flat.dtype)
    rows, flat = rows.to(dtype), flat.to(dtype)
    with full_precision(rows.device):
        if metric == "cosine":
            rows = F.normalize(rows, dim=-1)
        logits = flat @ rows.mT
        if metric in ("euclidean", "sqeuclidean"):
            logits = logits - rows.square().sum(-1) / 2
        elif metric == "dot" and bias is not None:
            logits = logits + bias.to(dtype)
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        step = max(1, _AT_ONCE // (top_k * len(rows)))
        radii = [_of(part, apart, top_k) for part in logits.split(step)]
    return torch.cat(radii).reshape(tokens.shape[:-1])


def _of(logits: Tensor, apart: Tensor, top_k: int) -> Tensor:
    best, chosen = logits.topk(top_k, dim=-1)
    gaps = best[..., None] - logits[:, None, :]
    distances = apart[chosen]
    # equal rows: never parted, unless they are equal in their logits too
    radii = torch.where(distances > 0, gaps / distances, torch.where(gaps > 0, torch.inf, 0.0))
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, False)
    return radii.masked_fill(~others[:, None, :], torch.inf).amin((-2, -1)).clamp_min(0)
