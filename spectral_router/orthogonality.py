"""Orthogonality penalties: what pulls the rows of every router's matrix to orthonormal, or orthogonal, ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._matrices import by_shape, in_order, total
from ._orthogonality import Form, check_form, off_identity
from ._precision import at_least_float32

__all__ = ["OrthogonalityPenalty"]


class OrthogonalityPenalty(nn.Module):
    """Pulls the rows of every router's matrix apart, to right angles; the sum over matrices of `functional.orthogonality`.

        "so": Σ_l ‖W_l W_lᵀ − I‖_F²    "simbal": Σ_l Σ_ij |W_l W_lᵀ − I|_ij    "ernie": Σ_l mean_ij (cos(w_i, w_j) − δ_ij)²

    For K <= d "so" and "simbal" are zero where `SpectralRankPenalty(1.0)` is: at orthonormal rows. "ernie" leaves lengths
    free and is a mean, so one coefficient serves every K. Matrices of equal shape are computed in one batch.

    **Shape**
        - Input: a `(*, K, d)` tensor, or an iterable of matrices `(K_i, d_i)` of any shapes, floating point.
        - Output: scalar, float32 (float64 if any matrix is), at least 0; NaN, or for inf perhaps inf, if a matrix holds them.

    Args:
        form: "so" (Bansal et al.), "simbal" (SimBal) or "ernie" (ERNIE 4.5, whose coefficient is 1e-2).

    Raises:
        ValueError: another form, no matrix, fewer than two dimensions, or an empty matrix.
        TypeError: a matrix that is not a tensor, or not floating point.

    Source:
        as `functional.orthogonality`.

    >>> OrthogonalityPenalty("simbal")([torch.eye(4, 16), 2 * torch.eye(8, 32)])  # 0 + 8 x |4 - 1|
    tensor(24.)
    """

    def __init__(self, form: Form = "so") -> None:
        super().__init__()
        check_form(form)
        self.form: Form = form

    def forward(self, weights: Tensor | Iterable[Tensor]) -> Tensor:
        return total(self._terms([weights] if isinstance(weights, Tensor) else list(weights))[0])

    def each(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The penalty of each matrix `(K_i, d_i)`, scalars in the order given: what `forward` sums up."""
        return in_order(*self._terms(list(weights)))

    def _terms(self, weights: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
        """For each group of matrices of equal shape: their penalties, and their positions."""
        groups, positions = by_shape(weights)
        return [off_identity(at_least_float32(torch.stack(group)), self.form) for group in groups], positions

    def extra_repr(self) -> str:
        return f"{self.form!r}"
