"""The spectral penalty's gradient, added to gradients that are there already: no graph, no copy of the weights.

Of a matrix W with Gram matrix G = W W^T, largest eigenvalue s^2 and eigenvector u, the gradient is A u u^T W + B W, one
product of a small matrix with W. So the weights are read twice, for G and for that product, and each gradient is changed in
place. Time and memory of a step: benchmarks/delivery.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._precision import full_precision
from .groups import by_shape
from .spectral_rank import Measured, SpectralRankPenalty

# The trace of a Gram matrix in between is far from over- and underflow, for the squares of its entries too.
_SAFE = 1e-12, 1e12
# Up to so many rows the small matrix costs less than passes over the weights for a vector.
_SMALL = 64


def fits(penalty: object, weights: Sequence[Tensor]) -> bool:
    """Whether the form below is for this penalty and these matrices: exact, in full precision, on a CPU, uncentred."""
    return (
        type(penalty) is SpectralRankPenalty
        and penalty.solver in ("auto", "exact")
        and not penalty.center
        and all(w.ndim == 2 and w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64) for w in weights)
    )


@torch.no_grad()
def add_gradients_(
    penalty: SpectralRankPenalty, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], coefficient: float
) -> bool:
    """gradient <- gradient + coefficient x gradient of the penalty, for each matrix (K, d) whose gradient is not None.

    Returns:
        False, with nothing done: a matrix is zero, not finite, or so large or small that its squares need care.
    """
    groups, positions = by_shape(list(weights))
    measured, values, first = [], [], 0
    for group in groups:
        found = _top(group)
        if found is None:
            return False
        sigma, rank, u = found
        leaves = sigma.requires_grad_(), rank.requires_grad_()
        measured.append(Measured(*leaves, penalty.goal(group), slice(first, first + len(group))))
        values.append(u)
        first += len(group)
    penalty.remember(groups)
    with torch.enable_grad():
        terms = penalty.terms(measured)
        leaves_of_all = [leaf for group in measured for leaf in (group.sigma, group.rank)]
        slopes = torch.autograd.grad(torch.stack([term.sum() for term in terms]).sum(), leaves_of_all, allow_unused=True)
    for index, (group, places) in enumerate(zip(groups, positions, strict=True)):
        on_sigma, on_rank = (
            torch.zeros_like(measured[index].sigma) if s is None else s for s in slopes[2 * index : 2 * index + 2]
        )
        sigma, rank = measured[index].sigma.detach(), measured[index].rank.detach()
        on_weight = 2 * on_rank / sigma.square()
        on_outer = on_sigma / sigma - on_weight * rank
        for place, weight, u, outer, plain in zip(places, group, values[index], on_outer, on_weight, strict=True):
            gradient = gradients[place]
            if gradient is not None:
                _add(gradient, weight, u, coefficient * outer, coefficient * plain)
    return True


def _top(group: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Spectral norm (L,), stable rank (L,) and top eigenvector (L, m) of L matrices of one shape."""
    rows = min(group[0].shape)
    with full_precision(group[0].device):
        gram = group[0].new_empty(len(group), rows, rows)
        for place, weight in zip(gram, group, strict=True):
            fat = weight if weight.shape[0] == rows else weight.mT
            torch.mm(fat, fat.mT, out=place)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        if not bool(((trace > _SAFE[0]) & (trace < _SAFE[1])).all()):
            return None
        eigenvalues, vectors = torch.linalg.eigh(gram)
        top = eigenvalues[:, -1]
        return top.sqrt(), (trace / top).clamp(1, rows), vectors[..., -1]


def _add(gradient: Tensor, weight: Tensor, u: Tensor, outer: Tensor, plain: Tensor) -> None:
    """gradient += outer · u uᵀ W + plain · W, or from the other side where W is taller than wide."""
    if weight.shape[0] > weight.shape[1]:
        gradient, weight = gradient.mT, weight.mT
    if len(u) <= _SMALL:
        small = torch.outer(outer * u, u)
        small.diagonal().add_(plain)
        gradient.addmm_(small, weight)
    else:
        gradient.add_(weight, alpha=plain.item())
        gradient.addr_(outer * u, u @ weight)
