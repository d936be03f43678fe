"""Orthogonality: how far the rows of a matrix are from orthonormal, or orthogonal, and the penalty that pulls them there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from .._precision import at_least_float32, full_precision
from .energy_formula import cosines
from .groups import by_shape, check_matrices, in_order, total

__all__ = ["OrthogonalityPenalty", "orthogonality"]

Form = Literal["so", "simbal", "ernie"]


def orthogonality(weight: Tensor, form: Form = "so") -> Tensor:
    """Distance of the Gram matrix of the rows from the identity, for each matrix.

    - "so", soft orthogonality: ‖W Wᵀ − I‖_F²
    - "simbal": Σ_ij |W Wᵀ − I|_ij
    - "ernie": mean_ij (cos(w_i, w_j) − δ_ij)², of directions only: lengths are free

    Zero, for K <= d, where the rows are orthonormal ("ernie": orthogonal). With K > d none can be zero: "so" and "simbal" are
    at least K − d, which rows at zero attain, so some experts may vanish; "ernie" at least 1/d − 1/K with no row at zero.
    For K > d `hyperspherical_energy` is the better measure.

    NOTE[DIFF]: Bansal et al. write W with a column a vector, SimBal R with a column an expert; here a row is an expert. The
    code of ERNIE 4.5 bounds the norms from below; here rows of any length are normalised, and a zero row counts as
    orthogonal to every row, itself too, with gradient zero.

    **Shape**
        - weight: `(*, K, d)`, floating point.
        - Output: `(*)`, float32 (float64 for float64 input), at least 0; NaN for NaN, NaN or inf for inf. "simbal" squares the
          entries, "so" twice: in float32 they leave its range, to inf or NaN, for entries from about 1e18 or 1e9 on.

    Args:
        weight: the matrices, one row an expert.
        form: "so", "simbal" or "ernie".

    Raises:
        ValueError: fewer than two dimensions, an empty matrix, or another form.
        TypeError: not floating point.

    Source:
        "so": Bansal et al., arXiv:1810.09102. "simbal": arXiv:2506.14038. "ernie": the orthogonal loss of ERNIE 4.5.

    >>> orthogonality(2 * torch.eye(3, 8))  # 3 x (4 - 1)^2
    tensor(27.)
    >>> orthogonality(2 * torch.eye(3, 8), "simbal")  # 3 x |4 - 1|
    tensor(9.)
    >>> orthogonality(torch.tensor([[2.0, 0.0], [3.0, 0.0]]), "ernie")  # two of four cosines are 1 in place of 0
    tensor(0.5000)
    """
    check_matrices(weight)
    check_form(form)
    return off_identity(at_least_float32(weight), form)


def check_form(form: str) -> None:
    if form not in ("so", "simbal", "ernie"):
        raise ValueError(f'form must be "so", "simbal" or "ernie", got {form=}')


def off_identity(rows: Tensor, form: Form) -> Tensor:
    """(*, K, d) -> (*), what `orthogonality` documents."""
    with full_precision(rows.device):
        gram = cosines(rows) if form == "ernie" else rows @ rows.mT
        off = gram - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        if form == "simbal":
            return off.abs().sum((-2, -1))
        return off.square().mean((-2, -1)) if form == "ernie" else off.square().sum((-2, -1))


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
