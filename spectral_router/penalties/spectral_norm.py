"""The spectral norm alone as a penalty, for the weight of any layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from .._precision import at_least_float32, full_precision, keep_precision
from .formulas import check_targets
from .groups import as_matrix, by_shape, in_order, total
from .spectrum import FIXED_SHARE, fixed_start, positive, rows_times, spectral_values

__all__ = ["SpectralNormPenalty"]

# The least number of iterations of the first call. Later ones go on from there, as weights move little in a training step.
_WARM_UP = 15


class SpectralNormPenalty(nn.Module):
    """Pulls the spectral norm of every matrix to a target: to zero by default, as spectral norm regularization does.

        Σ_l (σ_max(W_l)^k − σ_t^k)²

    The default, σ_t = 0 and k = 1, is Σ σ². σ_t = 1 with k = 2 is spectral regularization for continual learning, without its
    term for biases. σ_t = 1 with k = 1 is the first half of `SpectralRankPenalty`.

    NOTE[DIFF]: Yoshida & Miyato add (λ/2) Σ σ². The factor 1/2 is left out here, so that one formula holds for all: their
    λ is a coefficient of λ/2, and their λ = 0.01 is 0.005. The iteration starts from a fixed vector, not a random one, and a
    share of 1e-4 of it enters every later start, so that no start can be zero or orthogonal to the top direction for good.

    **Shape**
        - Input: a weight `(out, in, *kernel)`, or an iterable of weights of any shapes, floating point. Each is ONE matrix
          `(out, in * prod(kernel))`, as the paper reads a convolution: other than in `SpectralRankPenalty`, no leading
          dimension is a batch. Matrices of equal shape are computed in one batch.
        - Output: scalar, float32 (float64 if any weight is), at least 0; NaN if a weight holds NaN or inf; inf where
          σ^(2k) leaves the dtype. The zero matrix has σ = 0 with gradient 0.

    Args:
        sigma_target: σ_t, the norm at which the penalty is zero, at least 0.
        power: k, at least 1. The gradient grows as σ^(2k - 1): k = 2 needs small steps far above the target.
        solver: "iteration": power iterations from where the last call ended, as in the paper: u <- Wv/|Wv|, v <- Wᵀu/|Wᵀu|,
            σ = uᵀWv. Two matrix-vector products for each weight and iteration, no host synchronisation. It reads low where
            singular values crowd at the top and the weights move fast: by a percent or less with small coefficients and steps,
            at times by twenty where the penalty itself levels the top ones. u and v are held constant in gradients, in second
            ones too. The iterates are buffers that move and copy with the module and stay out of `state_dict`; they advance in
            training mode with gradients enabled only. Or "exact": `eigh` of the Gram matrix of the shorter side.
        iterations: how many a call, at least 1, the paper's number; the first call makes 15 or more. For "iteration" only.

    With `solver="iteration"` the module remembers its matrices by position: it belongs to one model, and every call must pass
    the same matrices.

    Raises:
        ValueError: an argument out of range, an unknown solver, no matrix, or other matrices than at the first call.
        TypeError: a weight that is not a tensor, or not floating point; a target, power or iterations of another kind.
        RuntimeError: on differentiating the gradient of the exact solver again.

    Source:
        Yoshida & Miyato, "Spectral Norm Regularization for Improving the Generalizability of Deep Learning", arXiv:1705.10941.
        σ_t = 1 and k: Lewandowski et al., "Learning Continually by Spectral Regularization", arXiv:2406.06811.

    >>> linear, convolution = torch.eye(4, 16), 2 * torch.eye(8, 27).view(8, 3, 3, 3)
    >>> SpectralNormPenalty()([linear, convolution])  # 1^2 + 2^2
    tensor(5.)
    >>> SpectralNormPenalty(1, power=2)([linear, convolution])  # (2^2 - 1)^2
    tensor(9.)
    """

    def __init__(
        self,
        sigma_target: float = 0.0,
        *,
        power: float = 1,
        solver: Literal["iteration", "exact"] = "iteration",
        iterations: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(sigma_target, (int, float)):
            raise TypeError(f"sigma_target must be a number, got {sigma_target=}")
        check_targets(sigma_target, None, False)
        if not isinstance(power, (int, float)):
            raise TypeError(f"power must be a number, got {power=}")
        if not 1 <= power < math.inf:
            raise ValueError(f"power must be a finite number of at least 1, got {power=}")
        if solver not in ("iteration", "exact"):
            raise ValueError(f'solver must be "iteration" or "exact", got {solver=}')
        if not isinstance(iterations, int):
            raise TypeError(f"iterations must be a whole number, got {iterations=}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations=}")
        self.sigma_target = sigma_target
        self.power = power
        self.solver = solver
        self.iterations = iterations

    def forward(self, weights: Tensor | Iterable[Tensor]) -> Tensor:
        return total(self._terms([weights] if isinstance(weights, Tensor) else list(weights))[0])

    def each(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The penalty of each weight, scalars in the order given: what `forward` sums up."""
        return in_order(*self._terms(list(weights)))

    def _terms(self, weights: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
        """For each group of matrices of equal shape: their penalties, and their positions."""
        groups, positions = by_shape([as_matrix(weight) for weight in weights])
        if self.solver == "exact":
            norms = [spectral_values(group)[0] for group in groups]
        else:
            self._remember(groups)
            norms = [self._iterated(group, f"iterate_{index}") for index, group in enumerate(groups)]
        return [(norm**self.power - self.sigma_target**self.power).square() for norm in norms], positions

    def _iterated(self, group: list[Tensor], name: str) -> Tensor:
        """(B,): the spectral norms as one more iteration reads them."""
        with full_precision(group[0].device):
            batch = at_least_float32(torch.stack(group))
            iterate: Tensor | None = getattr(self, name, None)
            with torch.no_grad():
                v = fixed_start(len(batch), batch.shape[-1], batch)
                if iterate is not None:
                    v = iterate.to(v) + FIXED_SHARE * v
                u = _unit(rows_times(v, batch.mT))
                for _ in range((max(_WARM_UP, self.iterations) if iterate is None else self.iterations) - 1):
                    u = _unit(rows_times(_unit(rows_times(u, batch)), batch.mT))
            image = rows_times(u, batch)  # backward needs u only: no copy of the weights is kept for it
            v = _unit(image.detach())
            if self._advances():
                kept = v.nan_to_num(0, 0, 0)  # of what is not finite; the next start is then the fixed one
                if iterate is None:
                    self.register_buffer(name, kept, persistent=False)
                else:
                    iterate.copy_(kept)
            return (v * image).sum(-1)

    def _remember(self, groups: list[list[Tensor]]) -> None:
        """Later calls must bring the matrices of the first one that stored its iterates."""
        shapes = [(len(group), *group[0].shape) for group in groups]
        known = getattr(self, "_shapes", shapes)
        if known != shapes:
            raise ValueError(
                f'with solver="iteration" every call must bring the matrices of the first call, shapes {known}, got {shapes}; '
                "use one SpectralNormPenalty for each model"
            )
        if self._advances():
            self._shapes = shapes

    def _advances(self) -> bool:
        """Whether this call stores its iterates."""
        return self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralNormPenalty:
        """`.to(device)` moves the iterates; `.half()` leaves them in full precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_precision(self, before)
        return self

    def extra_repr(self) -> str:
        return f"sigma_target={self.sigma_target}, power={self.power}, solver={self.solver!r}, iterations={self.iterations}"


def _unit(vectors: Tensor) -> Tensor:
    """Rows at unit length, zero ones left so; squared only after division by the largest entry, which can neither overflow
    nor vanish."""
    scaled = vectors / positive(vectors.abs().amax(-1, keepdim=True))
    return scaled / positive(torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
