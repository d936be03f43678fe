"""New places for prototypes that are dead or duplicates, which no gradient parts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from .._rules import check_tensor
from ..penalties.groups import check_matrices

__all__ = ["rescue_collapsed_"]


@torch.no_grad()
def rescue_collapsed_(
    weight: Tensor,
    *,
    share: Tensor | None = None,
    x: Tensor | None = None,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    tolerance: float = 0.01,
    dead: float = 0.01,
    generator: torch.Generator | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """Give dead and duplicate prototypes a new place, in place, and return which ones.

    Where all rows are equal the stable rank has gradient zero, and nothing but rounding parts them again. This does, at once.
    A row is collapsed if

    - it lies within `tolerance` of an earlier row that stays, in units of the root mean square of the rows' norms;
    - its norm is at most `tolerance` in that unit, or it holds NaN or inf;
    - its `share` of the tokens is below `dead` times an even share.

    With `x`, new places are drawn from these inputs as in k-means++: the odds are the squared distances from the nearest row so
    far, those that stay included. Without, they are random directions orthogonal to the rows that stay and to each other, as
    many as `dim` has left, then random ones, all of the root mean square norm of the rows that stay (1 if none does).
    The other rows keep every bit.

    Call it now and then, between steps: it waits for the device and computes on the CPU in float64. Equal arguments give equal
    results, on every rank; the global random state is neither read nor changed.

    **Shape**
        - weight: `(K, d)`, floating point, a row an expert; `share`: `(K)`; `x`: `(*, d)` with at least K vectors.
        - Output: `(K)`, bool, True where a row is new.

    Args:
        weight: the prototypes, or the weight of a linear gate; a parameter may be passed as it is.
        share: what each expert gets, at least 0 and in any unit: mean probability, number of tokens. None asks for no share.
            An entry that is NaN or inf says nothing of its expert, and an even share is that of the others.
        x: typical inputs of this router, finite; a few thousand are enough.
        metric: "euclidean" compares rows, "cosine" their directions, for gates that read no more.
        tolerance: at least 0 and below 1. Rows that bfloat16 rounds differently are up to 0.004 apart.
        dead: at least 0 and below 1.
        generator: source of randomness, on the CPU; None uses one with a fixed seed, so later calls draw alike.
        optimizer: the optimizer of `weight`, whose state of the new rows, momentum or Adam's moments, is set to zero.

    Raises:
        ValueError: an argument of the wrong shape or out of its range, `x` not finite, or an optimizer without `weight`.
        TypeError: a tensor that is not floating point.

    Source:
        ours; seeding by Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.

    >>> weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    >>> rescue_collapsed_(weight)
    tensor([False,  True])
    >>> weight[0] @ weight[1], weight.norm(dim=-1)
    (tensor(0.), tensor([5., 5.]))
    """
    _check_rescue(weight, share, x, optimizer)
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric must be "euclidean" or "cosine", got {metric=}')
    for name, value in (("tolerance", tolerance), ("dead", dead)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {name}={value}")
    rows = weight.double().cpu()
    collapsed = _collapsed(rows, share, metric, tolerance, dead)
    where = collapsed.to(weight.device)
    if not collapsed.any():
        return where
    kept, count = rows[~collapsed], int(collapsed.sum())
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if x is None:
        new = _free_directions(kept, count, generator)
    else:
        new = _far_inputs(kept, count, rearrange(x, "... d -> (...) d").double().cpu(), metric, generator)
    weight[where] = new.to(weight)
    for state in optimizer.state.get(weight, {}).values() if optimizer is not None else ():
        if isinstance(state, Tensor) and state.shape == weight.shape:
            state[where] = 0
    return where


def _collapsed(rows: Tensor, share: Tensor | None, metric: str, tolerance: float, dead: float) -> Tensor:
    """(K, d) -> (K)"""
    finite = rows.isfinite().all(-1)
    rows = torch.where(finite[:, None], rows, 0)
    norm = rows.norm(dim=-1)
    unit = norm[finite].square().mean().sqrt() if finite.any() else 0
    stays = finite & (norm > tolerance * unit)
    if share is not None:
        share = share.to(rows)
        known = share.isfinite()
        stays &= ~known | (share >= dead * share[known].mean())
    if metric == "cosine":
        rows, unit = _directions(rows), 1
    # the matmul that cdist prefers for many rows would cancel the distances of near rows
    close = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") <= tolerance * unit
    return ~stays | (close.tril(-1) & stays).any(-1)


def _free_directions(kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(m, d) -> (count, d)"""
    dim = kept.shape[-1]
    norm = kept.norm() / len(kept) ** 0.5 if len(kept) else 1
    _, values, basis = torch.linalg.svd(kept, full_matrices=False)
    basis = basis[values > 1e-12 * kept.norm()]
    free = min(count, dim - len(basis))
    new = _directions(torch.randn(count, dim, generator=generator, dtype=torch.float64))
    new[:free] = torch.linalg.qr(torch.cat([basis, new[:free]]).mT)[0].mT[len(basis) :]
    return norm * new


def _far_inputs(kept: Tensor, count: int, x: Tensor, metric: str, generator: torch.Generator) -> Tensor:
    """(m, d), (N, d) -> (count, d)"""
    place, taken = (_directions(x), _directions(kept)) if metric == "cosine" else (x, kept)
    nearest = torch.full_like(place[:, 0], math.inf)
    for row in taken:
        nearest = torch.minimum(nearest, (place - row).norm(dim=-1))
    chosen: list[int] = []
    for number in torch.rand(count, generator=generator, dtype=torch.float64):
        odds = nearest.square() if len(kept) or chosen else torch.ones_like(nearest)
        # with fewer distinct vectors than places every distance ends at zero: then any vector will do
        bounds = torch.where(odds.sum() > 0, odds, 1.0).cumsum(0)
        chosen.append(min(int(torch.searchsorted(bounds, number * bounds[-1], right=True)), len(x) - 1))
        nearest = torch.minimum(nearest, (place - place[chosen[-1]]).norm(dim=-1))
    return x[chosen]


def _directions(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _check_rescue(weight: Tensor, share: Tensor | None, x: Tensor | None, optimizer: torch.optim.Optimizer | None) -> None:
    check_matrices(weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be one matrix (experts, dim), got shape {tuple(weight.shape)}; call it once a gate")
    experts, dim = weight.shape
    if share is not None:
        check_tensor(share, "share")
        if share.shape != (experts,):
            raise ValueError(f"share must have one entry an expert, shape ({experts},), got shape {tuple(share.shape)}")
        if (share < 0).any():
            expert = int((share < 0).nonzero()[0])
            raise ValueError(
                f"share must be at least 0, got {share[expert].item()} of expert {expert}; pass mean probabilities or counts"
            )
    if x is not None:
        check_tensor(x, "x")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}; embed or convert it first")
        if x.ndim < 1 or x.shape[-1] != dim:
            raise ValueError(f"the last dimension of x must be dim={dim}, got shape {tuple(x.shape)}")
        if x.numel() < experts * dim:
            raise ValueError(f"x must hold at least num_experts={experts} vectors, got {x.numel() // dim}")
        if not x.isfinite().all():
            raise ValueError("x must be finite, got NaN or inf; drop those rows first")
    if optimizer is not None and not any(weight is held for group in optimizer.param_groups for held in group["params"]):
        raise ValueError(
            "optimizer must hold weight, got one that does not; pass the parameter itself, not a view or copy of it"
        )
