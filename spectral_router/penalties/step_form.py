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
from .spectrum import fixed_start

# The trace of a Gram matrix in between is far from over- and underflow, for the squares of its entries too.
_SAFE = 1e-12, 1e12
# Up to so many rows one product with a small matrix costs less than passes over weights and gradient.
_SMALL = 32
# Up to so many rows all eigenvectors are had as fast as one.
_FEW = 16
_SOLVES = 3


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
    found = [_top(group) for group in groups]
    if any(top is None for top in found):
        return False
    penalty.remember(groups)
    first = 0
    for group, places, top in zip(groups, positions, found, strict=True):
        sigma, rank, u = top  # type: ignore[misc]  # none is None
        of_group = Measured(sigma, rank, penalty.goal(group), slice(first, first + len(group)))
        first += len(group)
        on_sigma, on_rank = penalty.slopes(of_group)
        on_weight = on_rank * (2 * coefficient) / sigma.square()
        on_outer = on_sigma * coefficient / sigma - on_weight * rank
        _add(group, [gradients[place] for place in places], u, on_outer, on_weight)
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
        top, u = _top_of(gram)
        return top.sqrt(), (trace / top).clamp(1, rows), u


def _top_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (L,) and its eigenvector (L, m): of more than a few rows without the other vectors.

    Inverse iteration right above the largest eigenvalue damps what lies a relative gap g below it by eps / g each time.
    """
    rows = gram.shape[-1]
    if rows > _FEW:
        top = torch.linalg.eigvalsh(gram)[:, -1]
        above = gram.neg()
        above.diagonal(dim1=-2, dim2=-1).add_((top * (1 + 8 * rows**0.5 * torch.finfo(gram.dtype).eps))[:, None])
        factor, failed = torch.linalg.cholesky_ex(above)
        if not failed.any():
            u = fixed_start(len(gram), rows, gram)[..., None]
            for _ in range(_SOLVES):
                u = torch.cholesky_solve(u, factor)
                u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
            return top, u[..., 0]
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues[:, -1], vectors[..., -1]


def _add(group: list[Tensor], gradients: list[Tensor | None], u: Tensor, outer: Tensor, plain: Tensor) -> None:
    """gradient += outer · u uᵀ W + plain · W for each W, or from the other side where it is taller than wide."""
    if group[0].shape[0] > group[0].shape[1]:
        group, gradients = [w.mT for w in group], [None if g is None else g.mT for g in gradients]
    scaled = outer[:, None] * u
    if u.shape[1] <= _SMALL:
        small = scaled[:, :, None] * u[:, None]
        small.diagonal(dim1=-2, dim2=-1).add_(plain[:, None])
        for gradient, weight, matrix in zip(gradients, group, small, strict=True):
            if gradient is not None:
                gradient.addmm_(matrix, weight)
        return
    for gradient, weight, left, row, factor in zip(gradients, group, scaled, u, plain.tolist(), strict=True):
        if gradient is not None:
            gradient.add_(weight, alpha=factor)
            gradient.addr_(left, row @ weight)
