"""The hard version of the penalty: all singular values made equal, in place, after an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._precision import full_precision
from .formulas import check_targets
from .groups import by_shape

__all__ = ["project_spectral_"]

# Odd quintics σ -> aσ + bσ³ + cσ⁵ of the singular values. The first multiplies small ones by 3.65 and holds those that have
# arrived in [1/2, 1]; the second, Newton and Schulz's, triples the digits of those near 1.
_GROW = (3.65, -8.2, 5.48)
_POLISH = (15 / 8, -10 / 8, 3 / 8)
_POLISH_STEPS = 6  # from 0.25, where σ = 1 stands after division by its bound with K = 256, to 1 in float64
_STEPS_A_GRAM = 4  # more, and rounding in the Gram matrix shows: it grows by the square of what the steps multiply by


@torch.no_grad()
def project_spectral_(weights: Tensor | Iterable[Tensor], sigma_target: float = 1.0, *, steps: int = 12) -> None:
    """Make all singular values of every matrix equal, in place: W <- σ_t U Vᵀ, for W = U S Vᵀ.

    The hard version of `SpectralRankPenalty` with its default rank target: of the matrices at which that penalty is zero,
    the nearest in the Frobenius norm. Call it after `optimizer.step()`. The optimizer's state is left alone; no graph is made.

    U Vᵀ, the orthogonal polar factor, comes from matrix products alone, without host synchronisation: odd polynomials of the
    singular values, `steps` that grow small ones and six that bring all to 1, on the Gram matrix of the shorter side. All is
    computed in float64, whatever the dtype (in float32 on MPS, which has no other), so neither autocast nor TF32 matters.
    With condition numbers κ to 1e6, float32 weights come out right to rounding, float64 ones to about κ 1e-15.

    A singular value of zero stays zero, up to rounding: there is no direction to raise. One far below 1e-6 of the largest ends
    between zero and σ_t. At collapsed prototypes call `rescue_collapsed_` first: what this raises there is rounding.

    **Shape**
        - Input: a `(*, K, d)` tensor, or an iterable of tensors `(*, K_i, d_i)` of any shapes, floating point. Those of equal
          shape are computed in one batch. Entries from 1e-18 to 1e+18. A matrix with NaN or inf becomes NaN, the zero
          matrix stays zero.

    Args:
        weights: the matrices W_l; parameters that require gradients may be passed as they are.
        sigma_target: σ_t, the singular value of all directions afterwards, at least 0.
        steps: how many times small singular values are multiplied by 3.65. 12 serve condition numbers to 1e6, 6 to 1e3; 0 is
            enough where every matrix is a small step away from a projected one, condition number 1.1.

    Raises:
        ValueError: `sigma_target` or `steps` out of range, no matrix, an empty one, or fewer than two dimensions.
        TypeError: a `sigma_target` that is no number, a matrix that is not a tensor, or not floating point.

    Source:
        the zero of equations 3 + 5 of arXiv:2601.03889. Polar factor and iteration: Björck and Bowie, "An iterative algorithm
        for computing the best estimate of an orthogonal matrix", 1971; Higham, "Functions of Matrices", 2008, chapter 8.

    >>> weight = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    >>> project_spectral_(weight, sigma_target=2.0)
    >>> weight
    tensor([[2., 0., 0.],
            [0., 2., 0.]])
    """
    if not isinstance(sigma_target, (int, float)):
        raise TypeError(f"sigma_target must be a number, got {sigma_target=}")
    check_targets(sigma_target, None, relative=False)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number of at least 0, got {steps=}")
    groups, _ = by_shape([weights] if isinstance(weights, Tensor) else list(weights))
    for group in groups:
        dtype = torch.float32 if group[0].device.type == "mps" else torch.float64
        stacked = torch.stack(group).to(dtype)
        batch = stacked.flatten(0, -3)
        factor = _polar_factor(batch, steps) if batch.shape[-2] <= batch.shape[-1] else _polar_factor(batch.mT, steps).mT
        projected = (sigma_target * factor).reshape(stacked.shape)
        for weight, new in zip(group, projected, strict=True):
            weight.copy_(new)


def _polar_factor(fat: Tensor, steps: int) -> Tensor:
    """(B, m, n) -> (B, m, n), for m <= n."""
    tiny = torch.finfo(fat.dtype).tiny
    with full_precision(fat.device):
        factor = fat / fat.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        # σ_max² is at most the norm of the Gram matrix, and at least 1/√m of it
        factor = factor / torch.linalg.matrix_norm(factor @ factor.mT, keepdim=True).sqrt().clamp_min(tiny)
        identity = torch.eye(fat.shape[-2], dtype=fat.dtype, device=fat.device)
        polynomials = [_GROW] * steps + [_POLISH] * _POLISH_STEPS
        for first in range(0, len(polynomials), _STEPS_A_GRAM):
            gram, product = factor @ factor.mT, identity
            for a, b, c in polynomials[first : first + _STEPS_A_GRAM]:
                step = a * identity + b * gram + c * gram @ gram
                gram, product = step @ gram @ step, step @ product
            factor = product @ factor
    return factor
