"""Hyperspherical energy: how much the directions of the rows of a matrix crowd."""

from __future__ import annotations

import torch
from torch import Tensor

from .._precision import at_least_float32, full_precision
from .groups import check_matrices


def hyperspherical_energy(
    weight: Tensor, s: int = 2, *, angular: bool = False, half_space: bool = False, eps: float = 1e-4
) -> Tensor:
    """Mean energy of the pairs of rows, as of charges on the unit sphere that repel each other.

        E_s = 2 / (K (K − 1)) · Σ_{i<j} f_s(r_ij),    r_ij = ‖w_i/‖w_i‖ − w_j/‖w_j‖‖,    f_s(r) = r^−s,  f_0(r) = log(1/r)

    Only directions count. It is least, for K <= d + 1, at the simplex (cosines -1/(K-1)); with `half_space`, for K <= d,
    at orthogonal rows. (Angles with s = 0 prefer opposite pairs to the simplex from K = 4 on.) It is also defined for
    K > d, and grows as two rows meet, where the gradient of the stable rank vanishes.

    For r² < eps each f is continued by its tangent in r²: a true function with a true gradient, exact elsewhere, that rises
    to 2/eps (s = 2) at duplicates and repels all that are not exact. AT exact duplicates there is no direction to go: the
    gradient is zero, but for rounding (about 20/‖w‖ in float32). The angle has a kink at antipodal rows too, and is
    continued likewise from r² = 4 - eps on. A zero row counts as orthogonal to every row, with gradient zero.

    NOTE[DIFF]: The public code of both papers has log(1/r²) for s = 0, twice this; the angle over π, plus 1e-4; and
    ‖w‖² + 1e-4 under the root, which keeps r² of duplicates near 2e-4/‖w‖², so small rows hardly repel. Here: the
    formula, the angle in radians, and eps.

    NOTE[DIFF]: With `half_space` the public code has the K constant pairs (w_i, -w_i) in the mean. They are left out here,
    so the gradient is (2K - 1)/(2K - 2) times theirs, and one row has energy 0.

    **Shape**
        - weight: `(*, K, d)`, floating point.
        - Output: `(*)`, float32 (float64 for float64 input), above 0 for s > 0, at least log(1/2) (`angular`: log(1/π))
          for s = 0; 0 for K = 1; NaN for NaN or inf.

    Args:
        weight: the matrices, one row a neuron or expert.
        s: 0, 1 or 2, the power of 1/r.
        angular: r is the angle between the rows, in radians.
        half_space: each row also stands for its negative, so that lines spread, not rays: the mean over the pairs
            (w_i, w_j) and (w_i, -w_j). For gates that score by dot product.
        eps: where the tangent begins, in (0, 1]; 1e-4 is 0.57 degrees. It bounds the gradient of a pair, by about
            2 eps^-1.5 / ‖w‖ for s = 2. Rounding of r² is near 3e-7 in float32, more where
            `torch.set_float32_matmul_precision` allows less.

    Raises:
        ValueError: fewer than two dimensions, an empty matrix, or s or eps out of range.
        TypeError: not floating point.

    Source:
        arXiv:1805.09298.

    >>> hyperspherical_energy(torch.eye(2))  # r² = 2
    tensor(0.5000)
    >>> hyperspherical_energy(torch.eye(4) - 0.25)  # the simplex, r² = 2 + 2/3
    tensor(0.3750)
    """
    check_matrices(weight)
    check_energy(s, eps)
    return mean_energy(at_least_float32(weight), s, angular, half_space, eps)


def check_energy(s: int, eps: float) -> None:
    if s not in (0, 1, 2):
        raise ValueError(f"s must be 0, 1 or 2, the power of 1/r (0: its logarithm), got {s=}")
    if not 0 < eps <= 1:
        raise ValueError(f"eps must be above 0 and at most 1, as it is a floor of squared distances, got {eps=}")


def mean_energy(rows: Tensor, s: int, angular: bool, half_space: bool, eps: float) -> Tensor:
    """(*, K, d) -> (*), what `hyperspherical_energy` documents."""
    num_rows = rows.shape[-2]
    with full_precision(rows.device):
        cosine = cosines(rows)
        potential = _potential(2 - 2 * cosine, s, angular, eps)
        if half_space:
            potential = (potential + _potential(2 + 2 * cosine, s, angular, eps)) / 2
        others = 1 - torch.eye(num_rows, dtype=rows.dtype, device=rows.device)  # a factor, so that NaN stays, with one row too
        return (potential * others).sum((-2, -1)) / max(1, num_rows * (num_rows - 1))


def cosines(rows: Tensor) -> Tensor:
    """(*, K, d) -> (*, K, K). Each row is divided by its largest entry first, so that no square overflows or vanishes."""
    constant = rows.detach()
    largest = torch.maximum(constant.amax(-1, keepdim=True), -constant.amin(-1, keepdim=True))
    scaled = rows / torch.where(largest == 0, 1, largest)
    gram = scaled @ scaled.mT
    # lengths from the diagonal: all but two passes over the rows are on (K, K)
    squared = gram.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).rsqrt())
    return gram * inverse[..., :, None] * inverse[..., None, :]


def _potential(squared: Tensor, s: int, angular: bool, eps: float) -> Tensor:
    """f_s of squared distances in [0, 4], continued by its tangent below eps and, for angles, above 4 - eps."""
    inner = squared.clamp(eps, 4 - eps if angular else None)
    r = 2 * torch.asin(inner.sqrt() / 2) if angular else inner.sqrt()
    value = -r.log() if s == 0 else r**-s
    with torch.no_grad():
        slope_of_r = 1 / (inner * (4 - inner)).sqrt() if angular else 1 / (2 * r)
        slope = -max(s, 1) * r ** (-s - 1) * slope_of_r
    return value + slope * (squared - inner)
