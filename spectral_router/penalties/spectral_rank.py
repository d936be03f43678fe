"""What reads router weights. A penalty is any callable (weights of all gates) -> scalar, the sum over gates, unweighted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from einops import reduce
from torch import Tensor, nn

from .._precision import at_least_float32, keep_precision
from .formulas import check_targets, deviation, resolve_rank_target
from .groups import by_shape, in_order, matrices_in, total
from .spectrum import fixed_start, spectral_values

__all__ = ["SpectralRankPenalty"]


class SpectralRankPenalty(nn.Module):
    """Pulls the spectral norm and the stable rank of every router weight to targets.

        Σ_l [ (σ_max(W_l) − σ_t)² + (R(W_l) − ρ_t)² ]

    Matrices of equal shape are computed in one batch: the number of tensor operations does not grow with the number of
    gates. Values and gradients are those of `functional.spectral_rank_penalty`.

    **Shape**
        - Input: a `(*, K, d)` tensor, or an iterable of matrices `(K_i, d_i)` of any shapes, floating point.
        - Output: scalar, float32 (float64 if any matrix is), at least 0; NaN if a matrix holds NaN or inf.

    Args:
        sigma_target: σ_t, at least 0; or "initial": each matrix is held at the spectral norm it has when first
            seen (at 1 if it is zero then), because pulling a pretrained gate from 20 to 1 would flatten its routing. The
            anchors are a buffer, `anchor`, part of `state_dict`.
        rank_target: ρ_t; None is the largest stable rank that each matrix can reach: `min(K, d)`, or
            `min(K - 1, d)` if `center`.
        relative: divide both deviations by their targets, so that one coefficient serves every K and every scale.
        center: subtract the mean row first. Routing by distance does not change when all inputs and prototypes move
            together, while R(W) does; the centred optimum is a simplex (cosines -1/(K-1)) instead of an orthogonal set.
            The mean itself is then free to drift.
        solver: "exact" (`eigh` of the Gram matrix); or "power": 2^13 power iterations on the Gram matrix by repeated
            squaring, started where the last call ended: matmuls only, no host synchronisation, for training that is
            captured in a CUDA graph, or with very many experts. Where singular values crowd at the top, closer than
            about 3e-4 of σ, σ may read low by up to as much and R high by twice as much: near the optimum, where the
            penalty is small, that is a visible share of its value. The iterates are buffers that move and copy with the
            module and stay out of `state_dict`; they advance in training mode only.

    With `sigma_target="initial"` or `solver="power"` the module remembers its matrices by position: it belongs to one model,
    and every call must pass the same matrices.

    Raises:
        ValueError: a target out of range, an unknown solver, no matrix, or other matrices than at the first call.
        TypeError: a matrix that is not a tensor, or not floating point.
        RuntimeError: on differentiating the gradient again.

    Source:
        equations 3 + 5 of arXiv:2601.03889, summed over layers as in equation 7.

    >>> gates = [torch.eye(4, 16), 2 * torch.eye(8, 32), torch.eye(4, 16)]
    >>> SpectralRankPenalty()(gates)  # (2 - 1)^2
    tensor(1.)
    """

    anchor: Tensor | None

    @property
    def remembers(self) -> bool:
        """Whether it holds something of each matrix from call to call, so that it can serve one model only."""
        return self.sigma_target == "initial" or self.solver == "power"

    def __init__(
        self,
        sigma_target: float | Literal["initial"] = 1.0,
        rank_target: float | None = None,
        *,
        relative: bool = False,
        center: bool = False,
        solver: Literal["exact", "power"] = "exact",
    ) -> None:
        super().__init__()
        if sigma_target != "initial" and not isinstance(sigma_target, (int, float)):
            raise ValueError(f'sigma_target must be a number or "initial", got {sigma_target=}')
        check_targets(1.0 if sigma_target == "initial" else sigma_target, rank_target, relative)
        if solver not in ("exact", "power"):
            raise ValueError(f'solver must be "exact" or "power", got {solver=}')
        self.sigma_target = sigma_target
        self.rank_target = rank_target
        self.relative = relative
        self.center = center
        self.solver = solver
        self.register_buffer("anchor", None)

    def forward(self, weights: Tensor | Iterable[Tensor]) -> Tensor:
        return total(self._terms([weights] if isinstance(weights, Tensor) else list(weights))[0])

    def each(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The penalty of each matrix `(K_i, d_i)`, scalars in the order given: what `forward` sums up."""
        return in_order(*self._terms(list(weights)))

    def _terms(self, weights: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
        """For each group of matrices of equal shape: their penalties, and their positions."""
        groups, positions = by_shape(weights)
        rank_targets = [resolve_rank_target(self.rank_target, group[0], centered=self.center) for group in groups]
        self._remember(groups)
        terms, first = [], 0
        for index, (group, rank_target) in enumerate(zip(groups, rank_targets, strict=True)):
            last = first + matrices_in(group)
            terms.append(self._group_penalty(group, rank_target, index, slice(first, last)))
            first = last
        return terms, positions

    def _group_penalty(self, group: list[Tensor], rank_target: float, index: int, members: slice) -> Tensor:
        if self.center:
            batch = at_least_float32(torch.stack(group))
            group = [batch - reduce(batch, "... k d -> ... 1 d", "mean")]
        if self.solver == "exact":
            sigma, rank, _ = spectral_values(group)
        else:
            sigma, rank = self._power_values(group, f"iterate_{index}")
        return deviation(sigma, rank, self._sigma_target(sigma, members), rank_target, self.relative)

    def _power_values(self, group: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
        iterate = getattr(self, name, None)
        like = at_least_float32(group[0].new_empty(0))
        if iterate is None:
            iterate = fixed_start(matrices_in(group), min(group[0].shape[-2:]), like)
            if not _keeps_nothing():
                self.register_buffer(name, iterate, persistent=False)
        sigma, rank, u = spectral_values(group, iterate.to(like))
        if self.training and torch.is_grad_enabled():
            iterate.copy_(u)
        return sigma, rank

    def _sigma_target(self, sigma: Tensor, members: slice) -> float | Tensor:
        if not isinstance(self.sigma_target, str):
            return self.sigma_target
        seen = torch.where(sigma == 0, 1, sigma).detach()
        if self.anchor is None:  # first seen in inference mode, where nothing is kept
            return seen
        anchor = self.anchor[members].to(sigma)
        # not-a-number marks the matrices not seen yet, or seen with NaN entries only
        anchor = torch.where(anchor.isnan(), seen, anchor)
        if _keeps_nothing():
            return anchor
        self.anchor[members].copy_(anchor)
        return anchor

    def _remember(self, groups: list[list[Tensor]]) -> None:
        """On the first call make room for what is kept for each matrix; later calls must bring the same matrices."""
        if not self.remembers:
            return
        shapes = [(matrices_in(group), *group[0].shape[-2:]) for group in groups]
        known = getattr(self, "_shapes", shapes)
        if known != shapes:
            raise ValueError(
                f'with sigma_target="initial" or solver="power" every call must bring the matrices of the first call, shapes '
                f"{known}, got {shapes}; use one SpectralRankPenalty for each model"
            )
        count = sum(matrices_in(group) for group in groups)
        if _keeps_nothing() and not hasattr(self, "_shapes"):
            return
        if self.sigma_target == "initial" and self.anchor is None:
            dtype = torch.float64 if any(group[0].dtype == torch.float64 for group in groups) else torch.float32
            self.anchor = torch.full((count,), float("nan"), dtype=dtype, device=groups[0][0].device)
        elif self.anchor is not None and len(self.anchor) != count:
            raise ValueError(f"the loaded state holds anchors of {len(self.anchor)} matrices, got {count} matrices")
        self._shapes = shapes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralRankPenalty:
        """`.to(device)` moves the buffers; `.half()` leaves them in full precision, as they are measurements."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_precision(self, before)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Anchors exist from the first call on; a module that has made none yet must still be able to load them."""
        loaded = state_dict.get(f"{prefix}anchor")
        if loaded is not None and self.sigma_target == "initial" and self.anchor is None:
            self.anchor = torch.empty_like(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"sigma_target={self.sigma_target!r}, rank_target={self.rank_target}, relative={self.relative}, "
            f"center={self.center}, solver={self.solver!r}"
        )


def _keeps_nothing() -> bool:
    """Where nothing may be kept. A buffer made in inference mode could never be updated in training, one made of what a
    `torch.func` transform passes in would outlive it. Dynamo cannot ask."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_inference_mode_enabled() or torch._C._functorch.maybe_current_level() is not None
