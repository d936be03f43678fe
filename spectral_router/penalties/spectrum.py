"""The top singular triplet of a batch of matrices: two solvers and one closed-form gradient.

Everything the spectral penalties need follows from the largest singular value s and its vectors u, v (W v = s u):

    spectral norm  s                  d s / dW = u v^T
    stable rank    R = |W|_F^2 / s^2  d R / dW = (2 / s^2) (W - R s u v^T)

so no SVD is ever computed or differentiated. Both gradients are finite where the SVD's own are not: at equal singular
values (a subgradient, u v^T of one of them), at rank one, and at the zero matrix (zero, by convention).

Shapes: B matrices, m rows, n columns. Of a matrix that is taller than wide all is done with its transpose.

Time goes into memory, so passes over the weights are few and in place, and new memory of their size is taken once: the
batch of all in forward, kept for backward, where the gradient takes its place. benchmarks/penalty.py measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._precision import at_least_float32, full_precision

# Squaring the Gram matrix k times makes 2^k power iterations out of k matmuls of (m, m). One iteration a call, the usual
# choice for spectral normalisation, is not enough here: the penalty levels the top singular values, so the top direction
# keeps changing, and a lagging one lets the penalty rise in training (docs/numerics.md).
_SQUARINGS = 12
# Share of the fixed start vector in every start. Without it, a start that is zero (after a zero matrix), or exactly
# orthogonal to the new top vector (diagonal matrices), would stay so for ever.
FIXED_SHARE = 1e-4


def spectral_values(weights: Sequence[Tensor], start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Spectral norm, stable rank and top singular vector of each matrix.

    Args:
        weights: tensors (*, m, n) of one shape, dtype and device, B matrices in all.
        start: None solves by ``eigh`` of the Gram matrix of the shorter side. A (B, min(m, n)) tensor of unit rows starts a
            power iteration on that matrix instead: matmuls only, no host synchronisation.

    Returns:
        sigma (B,), differentiable; rank (B,), differentiable; u (B, min(m, n)), constant: the start of the next call.
    """
    sigma, rank, u, *_ = _SpectralValues.apply(start, *weights)
    return sigma, rank, u


def fixed_start(batch: int, rows: int, like: Tensor) -> Tensor:
    """(batch, rows): the same unit rows on every call, orthogonal to nothing in particular; no random state used."""
    steps = torch.arange(1, rows + 1, dtype=like.dtype, device=like.device)
    row = torch.sin(steps * steps)
    return (row / torch.linalg.vector_norm(row)).repeat(batch, 1)


class _SpectralValues(torch.autograd.Function):
    """Keeps its own copy of the weights for backward: sharded training may free the weights themselves before that."""

    @staticmethod
    def forward(start: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        with full_precision(weights[0].device):
            scaled, scale = _scaled_copy(weights)
            fat = _fat(scaled)
            gram = _finite_gram(fat, scale)
            u = _top_eigenvector(gram) if start is None else _power_iteration(gram, start)
            v = rows_times(u, fat)
            sigma = torch.linalg.vector_norm(v, dim=-1)
            v = v / positive(sigma)[:, None]
            # R is in [1, m] for every matrix but zero; the clamp takes off rounding, and what a lagging iteration adds
            rank = (_trace(gram) / positive(sigma.square())).clamp(1, fat.shape[-2])
            rank = torch.where(sigma == 0, sigma, rank)
            return sigma * scale, rank, u, v, scaled, scale, sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *weights = inputs
        _, *constants = output
        ctx.mark_non_differentiable(*constants[1:])
        ctx.set_materialize_grads(False)  # else zeros of the size of the weights, as the gradient of a constant
        ctx.save_for_backward(*constants)
        ctx.like = len(weights), weights[0].shape, weights[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_sigma: Tensor | None, grad_rank: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        count, shape, dtype = ctx.like
        saved = ctx.saved_tensors  # asked for once: a checkpoint or an offloader may hand them out once only
        zero = torch.zeros_like(saved[0])
        grad_sigma, grad_rank = (zero if grad is None else grad for grad in (grad_sigma, grad_rank))
        told = (grad_sigma, grad_rank, *saved, _last_backward())
        grad = _OnceDifferentiable.apply(*told) if torch.is_grad_enabled() else _gradient(*told)
        return None, *grad.to(dtype).view(count, *shape).unbind()


def _gradient(
    grad_sigma: Tensor,
    grad_rank: Tensor,
    rank: Tensor,
    u: Tensor,
    v: Tensor,
    scaled: Tensor,
    scale: Tensor,
    sigma: Tensor,
    last: bool,
) -> Tensor:
    """(B, m, n): of the weights, in closed form."""
    with full_precision(u.device):
        inverse = torch.where(sigma == 0, sigma, 1 / sigma)
        on_weight = 2 * grad_rank * inverse.square() / scale
        on_outer = (grad_sigma - on_weight * rank * sigma)[:, None]
        # the last use of the copy: the gradient takes its place, since new memory would cost more than the arithmetic
        grad = scaled.mul_(on_weight[:, None, None]) if last else scaled * on_weight[:, None, None]
        _fat(grad).baddbmm_((on_outer * u)[:, :, None], v[:, None, :])
        return grad


class _OnceDifferentiable(torch.autograd.Function):
    """The gradient where it may itself be differentiated, to fail there with a clear sentence."""

    @staticmethod
    def forward(*told: Any) -> Tensor:
        return _gradient(*told)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the spectral norm and the stable rank have a closed-form first derivative only, got a request for the second; "
            "take the penalty out of the part of the loss that you differentiate twice"
        )


def _last_backward() -> bool:
    """Whether the backward pass that runs now frees the graph behind it. Where torch does not tell, it does not."""
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return not torch.compiler.is_compiling() and told is not None and not told()


def _scaled_copy(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All matrices as one batch (B, m, n), each divided by its largest entry, and that entry (B,).

    Squares then neither overflow nor vanish between 1e-18 and 1e+18, and sigma >= 1 for every matrix but zero. NaN and inf
    make the scale, and with it every later value, not finite.
    """
    batch = at_least_float32(torch.stack(list(weights)).flatten(0, -3))
    # two plain reductions: the norm of order inf does the same in one, ten times slower on a CPU
    scale = torch.maximum(batch.amax((-2, -1)), -batch.amin((-2, -1))).clamp_min(torch.finfo(batch.dtype).tiny)
    return batch.div_(scale[:, None, None]), scale


def rows_times(rows: Tensor, batch: Tensor) -> Tensor:
    """(B, m), (B, m, n) -> (B, n). As rows: batches of matrix times column take many times as long on a CPU."""
    return torch.bmm(rows[:, None, :], batch)[:, 0]


def _fat(batch: Tensor) -> Tensor:
    return batch if batch.shape[-2] <= batch.shape[-1] else batch.mT


def _finite_gram(fat: Tensor, scale: Tensor) -> Tensor:
    """W W^T (B, m, m), with zeros in place of matrices that are not finite: ``eigh`` raises on those."""
    return torch.bmm(fat, fat.mT).masked_fill_(~scale.isfinite()[:, None, None], 0)


def _top_eigenvector(gram: Tensor) -> Tensor:
    """(B, m, m) -> (B, m), a copy: a view would keep all eigenvectors alive until backward."""
    return torch.linalg.eigh(gram)[1][..., -1].clone()


def _power_iteration(gram: Tensor, start: Tensor) -> Tensor:
    """(B, m, m), (B, m) -> (B, m): the start after 2^13 multiplications with the Gram matrix, at unit length."""
    power = gram / positive(_trace(gram))[:, None, None]
    for _ in range(_SQUARINGS):
        power = torch.bmm(power, power)
        power.div_(positive(_trace(power))[:, None, None])
    u = start + FIXED_SHARE * fixed_start(len(start), start.shape[1], gram)
    # twice: where the start holds next to nothing of the top direction, the first product is half rounding
    for _ in range(2):
        u = torch.bmm(power, u[..., None])[..., 0]
        u = u / positive(torch.linalg.vector_norm(u, dim=-1, keepdim=True))
    return u


def positive(norm: Tensor) -> Tensor:
    """Norms that may be divided by: zero becomes tiny, NaN stays."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _trace(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1).sum(-1)
