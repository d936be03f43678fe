"""What reads router weights. A penalty is any callable (weights of all gates) -> scalar, the sum over gates, unweighted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn

from .._precision import at_least_float32, keep_precision
from .anchors import drift, held_at, keeps_nothing, none_yet
from .formulas import check_targets, deviation, deviation_slopes, resolve_rank_target
from .groups import by_shape, in_order, matrices_in, total
from .spectrum import fixed_start, spectral_values

__all__ = ["SpectralRankPenalty"]


class Measured(NamedTuple):
    """Of a group of B matrices of one shape."""

    sigma: Tensor  # (B,)
    rank: Tensor  # (B,)
    rank_target: float | None  # None: their anchors
    members: slice  # where they are among all matrices, group after group


class SpectralRankPenalty(nn.Module):
    """Pulls the spectral norm and the stable rank of every router weight to targets.

        Σ_l [ (σ_max(W_l) − σ_t)² + (R(W_l) − ρ_t)² ]           or, `one_sided`,
        Σ_l [ max(σ_max(W_l) − σ_t, 0)² + max(ρ_t − R(W_l), 0)² ]

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
            `min(K - 1, d)` if `center`. "initial": each matrix is held at the stable rank it has when first seen (at 1 if it is
            zero then), for gates that are trained already, whose ranks are far below the largest. A buffer too,
            `rank_anchor`.
        relative: divide both deviations by their targets, so that one coefficient serves every K and every scale.
        center: subtract the mean row first. Routing by distance does not change when all inputs and prototypes move
            together, while R(W) does; the centred optimum is a simplex (cosines -1/(K-1)) instead of an orthogonal set.
            The mean itself is then free to drift.
        one_sided: only a norm above its target and a rank below it cost anything. With both targets "initial" the penalty and
            its gradient are zero at the start.
        solver: "exact": `eigh` of the Gram matrix, for which the host waits on a GPU. "power": 2^13 power iterations on the
            Gram matrix by repeated squaring, started where the last call ended: matmuls only, no host synchronisation. Where
            singular values crowd at the top, closer than about 3e-4 of σ, σ may read low by up to as much and R high by twice
            as much: near the optimum, where the penalty is small, that is a visible share of its value. The iterates are
            buffers that move and copy with the module and stay out of `state_dict`; they advance in training mode only.
            "auto": the exact one for matrices on a CPU; matmuls only on any other device and inside of compiled code, from
            the same start in every call, so that nothing is kept.

    With a target "initial" or `solver="power"` the module remembers its matrices by position: it belongs to one model,
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
    rank_anchor: Tensor | None

    @property
    def remembers(self) -> bool:
        """Whether it holds something of each matrix from call to call, so that it can serve one model only."""
        return "initial" in (self.sigma_target, self.rank_target) or self.solver == "power"

    def __init__(
        self,
        sigma_target: float | Literal["initial"] = 1.0,
        rank_target: float | Literal["initial"] | None = None,
        *,
        relative: bool = False,
        center: bool = False,
        one_sided: bool = False,
        solver: Literal["auto", "exact", "power"] = "auto",
    ) -> None:
        super().__init__()
        if sigma_target != "initial" and not isinstance(sigma_target, (int, float)):
            raise ValueError(f'sigma_target must be a number or "initial", got {sigma_target=}')
        if rank_target not in ("initial", None) and not isinstance(rank_target, (int, float)):
            raise ValueError(f'rank_target must be a number, "initial" or None, got {rank_target=}')
        check_targets(
            1.0 if isinstance(sigma_target, str) else sigma_target,
            None if isinstance(rank_target, str) else rank_target,
            relative,
        )
        if solver not in ("auto", "exact", "power"):
            raise ValueError(f'solver must be "auto", "exact" or "power", got {solver=}')
        self.sigma_target = sigma_target
        self.rank_target = rank_target
        self.relative = relative
        self.center = center
        self.one_sided = one_sided
        self.solver = solver
        self.register_buffer("anchor", None)
        self.register_buffer("rank_anchor", None)

    def forward(self, weights: Tensor | Iterable[Tensor]) -> Tensor:
        return total(self._terms([weights] if isinstance(weights, Tensor) else list(weights))[0])

    def each(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The penalty of each matrix `(K_i, d_i)`, scalars in the order given: what `forward` sums up."""
        return in_order(*self._terms(list(weights)))

    @torch.no_grad()
    def drift(self, weights: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """σ / σ_t − 1 and R / ρ_t − 1 of each matrix, in the order given, against its anchors; NaN where there are none."""
        groups, positions = self._measured(list(weights))
        norms = [drift(self._anchors("sigma"), group.members, group.sigma) for group in groups]
        ranks = [drift(self._anchors("rank"), group.members, group.rank) for group in groups]
        return in_order(norms, positions), in_order(ranks, positions)

    def _terms(self, weights: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
        """For each group of matrices of equal shape: their penalties, and their positions."""
        groups, positions = self._measured(weights)
        return [deviation(g.sigma, g.rank, *self._targets(g), self.relative, self.one_sided) for g in groups], positions

    def slopes(self, group: Measured) -> tuple[Tensor, Tensor]:
        """Derivatives of the group's penalties by spectral norm and by stable rank, (B,) each."""
        return deviation_slopes(group.sigma, group.rank, *self._targets(group), self.relative, self.one_sided)

    def _targets(self, group: Measured) -> tuple[float | Tensor, float | Tensor]:
        sigma, rank, goal, members = group
        norm = held_at(self.anchor, members, sigma) if isinstance(self.sigma_target, str) else self.sigma_target
        return norm, held_at(self.rank_anchor, members, rank) if goal is None else goal

    def goal(self, group: list[Tensor]) -> float | None:
        """The stable rank that matrices of this shape are pulled to; None: their anchors."""
        wanted = self.rank_target
        return None if isinstance(wanted, str) else resolve_rank_target(wanted, group[0], centered=self.center)

    def _measured(self, weights: list[Tensor]) -> tuple[list[Measured], list[list[int]]]:
        groups, positions = by_shape(weights)
        goals = [self.goal(group) for group in groups]
        self.remember(groups)
        measured, first = [], 0
        for index, (group, goal) in enumerate(zip(groups, goals, strict=True)):
            last = first + matrices_in(group)
            measured.append(Measured(*self._values(group, index), goal, slice(first, last)))
            first = last
        return measured, positions

    def _values(self, group: list[Tensor], index: int) -> tuple[Tensor, Tensor]:
        if self.center:
            batch = at_least_float32(torch.stack(group))
            group = [batch - reduce(batch, "... k d -> ... 1 d", "mean")]
        if self.solver == "power":
            return self._power_values(group, f"iterate_{index}")
        start = None
        if self.solver == "auto" and (group[0].device.type != "cpu" or torch.compiler.is_compiling()):
            start = _start(group)
        sigma, rank, _ = spectral_values(group, start)
        return sigma, rank

    def _power_values(self, group: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
        iterate = getattr(self, name, None)
        if iterate is None:
            iterate = _start(group)
            if not keeps_nothing():
                self.register_buffer(name, iterate, persistent=False)
        sigma, rank, u = spectral_values(group, iterate.to(at_least_float32(group[0].new_empty(0))))
        if self.training and torch.is_grad_enabled():
            iterate.copy_(u)
        return sigma, rank

    def _anchors(self, of: Literal["sigma", "rank"]) -> Tensor | None:
        """Those in use: a state that was loaded may hold others."""
        target, anchors = (self.sigma_target, self.anchor) if of == "sigma" else (self.rank_target, self.rank_anchor)
        return anchors if target == "initial" else None

    def remember(self, groups: list[list[Tensor]]) -> None:
        """On the first call make room for what is kept for each matrix; later calls must bring the same matrices."""
        if not self.remembers:
            return
        shapes = [(matrices_in(group), *group[0].shape[-2:]) for group in groups]
        known = getattr(self, "_shapes", shapes)
        if known != shapes:
            raise ValueError(
                f'with a target "initial" or solver="power" every call must bring the matrices of the first call, shapes '
                f"{known}, got {shapes}; use one SpectralRankPenalty for each model"
            )
        count = sum(matrices_in(group) for group in groups)
        if keeps_nothing() and not hasattr(self, "_shapes"):
            return
        for target, name in ((self.sigma_target, "anchor"), (self.rank_target, "rank_anchor")):
            anchors = getattr(self, name)
            if anchors is not None and len(anchors) != count:
                raise ValueError(f"the loaded state holds anchors of {len(anchors)} matrices, got {count} matrices")
            if target == "initial" and anchors is None:
                setattr(self, name, none_yet(count, [group[0] for group in groups]))
        self._shapes = shapes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralRankPenalty:
        """`.to(device)` moves the buffers; `.half()` leaves them in full precision, as they are measurements."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_precision(self, before)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Anchors exist from the first call on; a module that has made none yet must still be able to load them."""
        for target, name in ((self.sigma_target, "anchor"), (self.rank_target, "rank_anchor")):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and target == "initial" and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"sigma_target={self.sigma_target!r}, rank_target={self.rank_target!r}, relative={self.relative}, "
            f"center={self.center}, one_sided={self.one_sided}, solver={self.solver!r}"
        )


def _start(group: list[Tensor]) -> Tensor:
    return fixed_start(matrices_in(group), min(group[0].shape[-2:]), at_least_float32(group[0].new_empty(0)))
