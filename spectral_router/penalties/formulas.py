"""The formulas of the spectral penalties on tensors: equations 3 to 5.

Source of every equation number: Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE
Architectures", arXiv:2601.03889. Shapes: `*` any leading dimensions, K experts.
"""

from __future__ import annotations

from torch import Tensor

from .groups import check_matrices
from .spectrum import spectral_values


def spectral_norm(weight: Tensor) -> Tensor:
    """Largest singular value of each matrix, σ_max(W) = ‖W‖₂.

    Exact, with the closed-form gradient u vᵀ. Computed in float32 (float64 for float64 input) whatever the
    autocast state, for entries from 1e-18 to 1e+18; half precision is upcast first. The one setting it follows is
    `torch.set_float32_matmul_precision`: below "highest" (TF32) expect errors near 1e-3.

    **Shape**
        - Input: `(*, m, n)`, floating point. The side that is shorter does not matter.
        - Output: `(*)`, float32 or float64, in `[0, inf)`. The zero matrix gives 0 with gradient 0; NaN or inf gives NaN.

    Raises:
        ValueError: fewer than two dimensions, or an empty matrix.
        TypeError: not floating point.
        RuntimeError: on differentiating the gradient again (there is no closed form for it here).

    Source:
        the norm of equation 3.

    >>> import torch
    >>> spectral_norm(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    tensor(4.)
    """
    return _values(weight)[0]


def stable_rank(weight: Tensor) -> Tensor:
    """Stable rank of each matrix, R(W) = ‖W‖_F² / σ_max(W)².

    How many directions a matrix uses, softly: 1 when one direction holds all its energy, `min(m, n)` when all singular
    values are equal. Scale-free and never above the rank. Its gradient, (2/σ²)(W − R σ u vᵀ), is
    zero at rank one: it keeps a router from collapsing; out of a collapse only rounding leads.

    **Shape**
        - Input: `(*, m, n)`, floating point.
        - Output: `(*)`, float32 or float64, in `[1, min(m, n)]`; 0 for the zero matrix; NaN for NaN or inf.

    Raises:
        ValueError, TypeError, RuntimeError: as `spectral_norm`.

    Source:
        equation 4.

    >>> import torch
    >>> stable_rank(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))  # (9 + 16) / 16
    tensor(1.5625)
    """
    return _values(weight)[1]


def spectral_rank_penalty(
    weight: Tensor,
    sigma_target: float | Tensor = 1.0,
    rank_target: float | Tensor | None = None,
    *,
    relative: bool = False,
    one_sided: bool = False,
) -> Tensor:
    """Squared distance of spectral norm and stable rank from their targets, for each matrix.

        (σ_max(W) − σ_t)² + (R(W) − ρ_t)²                       or, `one_sided`,
        max(σ_max(W) − σ_t, 0)² + max(ρ_t − R(W), 0)²

    With the default targets it is zero exactly where the rows (for K <= d) are orthonormal.

    NOTE[DIFF]: The paper calls W "the linear gate parameters" in 3.2 and has prototypes in place of a linear gate in 3.1.3.
    Read here: W is the matrix of the router whatever its kind, prototypes or gate weight, one row an expert.

    **Shape**
        - weight: `(*, m, n)`, floating point.
        - Output: `(*)`, float32 or float64, at least 0; NaN for NaN or inf; inf where the square leaves the dtype, which in
          float32 is for σ_max from 1.8e19 on.

    Args:
        weight: the matrices W_l.
        sigma_target: σ_t, at least 0 (above 0 if `relative`), or a tensor of them that broadcasts to `(*)`. The
            paper prints no value; "singular values near unity" in its introduction suggests 1.
        rank_target: ρ_t in `[1, min(m, n)]`, or a tensor of them that broadcasts to `(*)`; None is `min(m, n)`, the largest
            that can be reached. A lower target is met by letting some experts' rows vanish.
        relative: divide both deviations by their targets. The raw rank term grows as K^2 ((K - 1)^2 at collapse), so a raw
            coefficient cannot be shared between routers with different K; the relative one, at the default target, lies in
            `[0, 1]` for every K.
        one_sided: only a norm above its target and a rank below it cost anything.

    Raises:
        ValueError: a target out of its range; and as `spectral_norm`.
        TypeError, RuntimeError: as `spectral_norm`.

    Source:
        equations 3 + 5.

    >>> import torch
    >>> spectral_rank_penalty(torch.eye(4, 16))
    tensor(0.)
    >>> spectral_rank_penalty(3 * torch.eye(4, 16))  # (3 - 1)^2
    tensor(4.)
    """
    check_targets(sigma_target, rank_target, relative)
    sigma, rank = _values(weight)
    target = rank_target if isinstance(rank_target, Tensor) else resolve_rank_target(rank_target, weight)
    return deviation(sigma, rank, sigma_target, target, relative, one_sided)


def check_targets(sigma_target: float | Tensor, rank_target: float | Tensor | None, relative: bool) -> None:
    """The part of the targets' rules that needs no weight."""
    if not isinstance(sigma_target, Tensor):
        if not isinstance(sigma_target, (int, float)):
            raise TypeError(f"sigma_target must be a number or a tensor, got {sigma_target=}")
        if not 0 <= sigma_target < float("inf"):
            raise ValueError(f"sigma_target must be a finite number of at least 0, got {sigma_target=}")
        if relative and sigma_target == 0:
            raise ValueError("sigma_target must be above 0 when relative=True, got sigma_target=0; it is divided by")
    if rank_target is None or isinstance(rank_target, Tensor):
        return
    if not isinstance(rank_target, (int, float)):
        raise TypeError(f"rank_target must be a number, a tensor or None, got {rank_target=}")
    if not rank_target >= 1:
        raise ValueError(f"rank_target must be at least 1, the least stable rank there is, got {rank_target=}")


def resolve_rank_target(rank_target: float | None, weight: Tensor, *, centered: bool = False) -> float:
    """The rank target for matrices of this shape; by default the largest one they can reach."""
    rows, columns = weight.shape[-2:]
    reachable = max(1, min(rows - centered, columns))
    if rank_target is None:
        return float(reachable)
    if rank_target > reachable:
        limit = "min(num_experts - 1, dim)" if centered else "min(num_experts, dim)"
        raise ValueError(
            f"rank_target must be at most {limit} = {reachable}, the largest stable rank that a matrix of shape "
            f"({rows}, {columns}) can reach, got {rank_target=}"
        )
    return float(rank_target)


def deviation(
    sigma: Tensor,
    rank: Tensor,
    sigma_target: float | Tensor,
    rank_target: float | Tensor,
    relative: bool,
    one_sided: bool = False,
) -> Tensor:
    """Equations 3 + 5 from values already computed."""
    above, below = _deviations(sigma, rank, sigma_target, rank_target, relative, one_sided)
    return above.square() + below.square()


def deviation_slopes(
    sigma: Tensor,
    rank: Tensor,
    sigma_target: float | Tensor,
    rank_target: float | Tensor,
    relative: bool,
    one_sided: bool = False,
) -> tuple[Tensor, Tensor]:
    """Derivatives of `deviation` by sigma and by rank."""
    above, below = _deviations(sigma, rank, sigma_target, rank_target, relative, one_sided)
    if relative:
        above, below = above / sigma_target, below / rank_target
    return 2 * above, -2 * below


def _deviations(
    sigma: Tensor, rank: Tensor, sigma_target: float | Tensor, rank_target: float | Tensor, relative: bool, one_sided: bool
) -> tuple[Tensor, Tensor]:
    above, below = sigma - sigma_target, rank_target - rank
    if relative:
        above, below = above / sigma_target, below / rank_target
    if one_sided:
        above, below = above.clamp_min(0), below.clamp_min(0)  # which leaves NaN
    return above, below


def _values(weight: Tensor) -> tuple[Tensor, Tensor]:
    check_matrices(weight)
    sigma, rank, _ = spectral_values([weight])
    return sigma.reshape(weight.shape[:-2]), rank.reshape(weight.shape[:-2])
