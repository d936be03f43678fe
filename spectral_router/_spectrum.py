"""The top singular triplet of a batch of matrices: two solvers and one closed-form gradient.

Everything the spectral penalties need follows from the largest singular value s and its vectors u, v (W v = s u):

    spectral norm  s                  d s / dW = u v^T
    stable rank    R = |W|_F^2 / s^2  d R / dW = (2 / s^2) (W - R s u v^T)

so no SVD is ever computed or differentiated. Both gradients are finite where the SVD's own are not: at equal singular
values (a subgradient, u v^T of one of them), at rank one, and at the zero matrix (zero, by convention).

Shapes: B matrices, m rows, n columns, m <= n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Squaring the Gram matrix k times makes 2^k power iterations out of k matmuls of (m, m). One iteration a call, the usual
# choice for spectral normalisation, is not enough here: the penalty levels the top singular values, so the top direction
# keeps changing, and a lagging one lets the penalty rise in training (docs/numerics.md).
_SQUARINGS = 10
# Share of the fixed start vector in every start. Without it, a start that is zero (after a zero matrix), or exactly
# orthogonal to the new top vector (diagonal matrices), would stay so for ever.
_FIXED_SHARE = 1e-4


def spectral_values(weight: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Spectral norm, stable rank and left singular vector of each matrix of a batch.

    Args:
        weight: (B, m, n), m <= n, float32 or float64.
        start: None solves by ``eigh`` of the (m, m) Gram matrix. A (B, m) tensor of unit rows starts a power iteration on
            that matrix instead: matmuls only, no host synchronisation.

    Returns:
        sigma (B,), differentiable; rank (B,), differentiable; u (B, m), constant: the start of the next call.
    """
    sigma, rank, u, *_ = _SpectralValues.apply(weight, start)
    return sigma, rank, u


def fixed_start(weight: Tensor) -> Tensor:
    """(B, m, n) -> (B, m): the same unit rows on every call, orthogonal to nothing in particular; no random state used."""
    steps = torch.arange(1, weight.shape[-2] + 1, dtype=weight.dtype, device=weight.device)
    row = torch.sin(steps * steps)
    return (row / torch.linalg.vector_norm(row)).repeat(weight.shape[0], 1)


class _SpectralValues(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, start: Tensor | None) -> tuple[Tensor, ...]:
        with torch.autocast(weight.device.type, enabled=False):
            scaled, scale = _scale_to_one(weight)
            gram = _finite_gram(scaled, scale)
            u = torch.linalg.eigh(gram)[1][..., -1:] if start is None else _power_iteration(gram, start)
            v = scaled.mT @ u
            sigma = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
            v = v / _positive(sigma)
            sigma = sigma[..., 0, 0]
            # R is in [1, m] for every matrix but zero; the clamp takes off rounding, and what a lagging iteration adds
            rank = (_trace(gram) / _positive(sigma).square()).clamp(1, weight.shape[-2])
            rank = torch.where(sigma == 0, sigma, rank)
            return sigma * scale, rank, u[..., 0], v[..., 0], scaled, scale, sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *constants = output
        ctx.mark_non_differentiable(*constants[1:])
        ctx.save_for_backward(*constants)

    @staticmethod
    def backward(ctx: Any, grad_sigma: Tensor, grad_rank: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        return _SpectralGradient.apply(grad_sigma, grad_rank, *ctx.saved_tensors), None


class _SpectralGradient(torch.autograd.Function):
    """The gradient is a function of its own only so that asking for the gradient of it fails with a clear sentence."""

    @staticmethod
    def forward(
        grad_sigma: Tensor,
        grad_rank: Tensor,
        rank: Tensor,
        u: Tensor,
        v: Tensor,
        scaled: Tensor,
        scale: Tensor,
        sigma: Tensor,
    ) -> Tensor:
        with torch.autocast(scaled.device.type, enabled=False):
            inverse = torch.where(sigma == 0, sigma, 1 / sigma)
            on_weight = 2 * grad_rank * inverse.square() / scale
            on_outer = grad_sigma - on_weight * rank * sigma
            return torch.baddbmm(on_weight[:, None, None] * scaled, (on_outer[:, None] * u)[:, :, None], v[:, None, :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the spectral norm and the stable rank have a closed-form first derivative only, got a request for the second; "
            "take the penalty out of the part of the loss that you differentiate twice"
        )


def _scale_to_one(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each matrix by its largest entry, so that squares neither overflow nor vanish; return also that entry (B,).

    After it, sigma >= 1 for every matrix but zero. NaN and inf make the scale, and with it every later value, not finite.
    """
    scale = torch.linalg.vector_norm(weight, ord=float("inf"), dim=(-2, -1))
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight / scale[:, None, None], scale


def _finite_gram(scaled: Tensor, scale: Tensor) -> Tensor:
    """W W^T (B, m, m), with the identity in place of matrices that are not finite: ``eigh`` raises on those."""
    identity = torch.eye(scaled.shape[-2], dtype=scaled.dtype, device=scaled.device)
    return torch.where(scale.isfinite()[:, None, None], scaled @ scaled.mT, identity)


def _power_iteration(gram: Tensor, start: Tensor) -> Tensor:
    """(B, m, m), (B, m) -> (B, m, 1): the start after 2^10 multiplications with the Gram matrix, at unit length."""
    power = gram
    for _ in range(_SQUARINGS):
        power = power / _positive(_trace(power))[:, None, None]
        power = power @ power
    u = power @ (start + _FIXED_SHARE * fixed_start(gram))[..., None]
    return u / _positive(torch.linalg.vector_norm(u, dim=-2, keepdim=True))


def _positive(norm: Tensor) -> Tensor:
    """Norms that may be divided by: zero becomes one, NaN stays."""
    return torch.where(norm == 0, 1.0, norm)


def _trace(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1).sum(-1)
