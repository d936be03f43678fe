"""Minimum hyperspherical energy, plain (MHE) and compressive (CoMHE): a penalty that spreads the directions of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from .._precision import at_least_float32, keep_precision
from .energy_formula import check_energy, mean_energy
from .energy_projections import angles_kept, climb, mix, normal, project
from .groups import by_shape, in_order, total

__all__ = ["HypersphericalEnergyPenalty"]

Projection = Literal["random", "angle_preserving", "adversarial"]


class HypersphericalEnergyPenalty(nn.Module):
    """Spreads the directions of every router's rows; the sum over matrices of `hyperspherical_energy`.

        Σ_l E_s(W_l),    with a projection   Σ_l mean_P E_s(W_l Pᵀ),  P (p, d)

    - "random": P is iid normal, new at every training call.
    - "angle_preserving": P starts random and takes a gradient step on ‖cos(W Pᵀ) − cos(W)‖² at every training call.
    - "adversarial": from a random P, gradient steps uphill on the energy itself: a more crowded view.

    P is a constant of the loss. It follows from the seed, the number of training calls and the weights: equal on all ranks,
    and the global random state is neither read nor changed. Matrices of equal shape are computed in one batch.

    NOTE[DIFF]: Where P is learned, the public code also differentiates through its last step, follows the norm and not its
    square, and checks no step; here each is the best of itself, a quarter, a sixteenth and none. Its adversary climbs
    the full-space energy whatever is minimised, and goes on from step to step; here it climbs the same, and starts anew:
    one that goes on finds a P under which two rows coincide.

    **Shape**
        - Input: a `(*, K, d)` tensor, or an iterable of matrices `(K_i, d_i)` of any shapes, floating point.
        - Output: scalar, float32 (float64 if any matrix is); NaN if a matrix holds NaN or inf.

    Args:
        s, angular, half_space, eps: as `hyperspherical_energy`. The public CoMHE code has s=2, half_space=True.
        projection: None, "random", "angle_preserving" or "adversarial".
        projection_dim: p, cut to d; None is 40 (random) or 30, the public settings. A random P moves cosines by about
            1/√p, so take more for hundreds of experts; with d below 64 there is little to project.
        num_projections: the mean is over this many P; None is 20 (random) or 1.
        shared_projection: one P for all matrices of equal d; False is one for each, as in the public code.
        resample_every: training calls from one random P to the next (of the adversary: its start).
        projection_steps: gradient steps on P a call; None is 1 (angle_preserving) or 10 (adversarial).
        projection_lr: length of the step, in units of ‖P‖² min(K, d)²/d times the gradient, so that one value serves all
            shapes; None is 0.1, or 0.001 (adversarial), as more makes rows coincide.
        groups: without a projection, the mean energy over this many random groups of d // groups coordinates each.
        seed: of all random P, from 0 to 2^32 - 1.

    `step`, the number of training calls, is a buffer wherever P is random, and each learned P is another: `state_dict` resumes.
    With "angle_preserving", and with `shared_projection=False`, P belongs to a matrix by its position.

    Raises:
        ValueError: an option out of range, no matrix, more groups than dimensions, or, with "angle_preserving", other
            matrices than at the first call.
        TypeError: a matrix that is not a tensor, or not floating point.

    Source:
        arXiv:1805.09298; projections: arXiv:1906.04892.

    >>> gates = [torch.eye(4, 16), 2 * torch.eye(8, 32), torch.eye(4, 16)]
    >>> HypersphericalEnergyPenalty()(gates)  # 3 x 1/2
    tensor(1.5000)
    >>> penalty = HypersphericalEnergyPenalty(half_space=True, projection="random", projection_dim=8)
    >>> bool(penalty(gates) > 1.5)  # no set of 8 lines in 8 dimensions is better than orthogonal ones
    True
    """

    step: Tensor

    def __init__(
        self,
        s: int = 2,
        *,
        angular: bool = False,
        half_space: bool = False,
        eps: float = 1e-4,
        projection: Projection | None = None,
        projection_dim: int | None = None,
        num_projections: int | None = None,
        shared_projection: bool = True,
        resample_every: int = 1,
        projection_steps: int | None = None,
        projection_lr: float | None = None,
        groups: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_energy(s, eps)
        if projection not in (None, "random", "angle_preserving", "adversarial"):
            raise ValueError(f'projection must be None, "random", "angle_preserving" or "adversarial", got {projection=}')
        counts = {
            "projection_dim": projection_dim,
            "num_projections": num_projections,
            "resample_every": resample_every,
            "projection_steps": projection_steps,
            "groups": groups,
        }
        for name, count in counts.items():
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {name}={count!r}")
        if projection_lr is not None and not 0 < projection_lr < math.inf:
            raise ValueError(f"projection_lr must be a finite number above 0, got {projection_lr=}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed=}")
        if groups is not None and projection is not None:
            raise ValueError(f"groups takes the place of a projection, got {groups=}, {projection=}; set one of them to None")
        self.s, self.angular, self.half_space, self.eps = s, angular, half_space, eps
        self.projection = projection
        self.projection_dim = projection_dim or (40 if projection == "random" else 30)
        self.num_projections = num_projections or (20 if projection == "random" else 1)
        self.shared_projection = shared_projection
        self.resample_every = resample_every
        self.projection_steps = projection_steps or (10 if projection == "adversarial" else 1)
        self.projection_lr = projection_lr or (0.001 if projection == "adversarial" else 0.1)
        self.groups = groups
        self.seed = seed
        if projection is not None or groups is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, weights: Tensor | Iterable[Tensor]) -> Tensor:
        return total(self._terms([weights] if isinstance(weights, Tensor) else list(weights))[0])

    def each(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The energy of each matrix `(K_i, d_i)`, scalars in the order given: what `forward` sums up."""
        return in_order(*self._terms(list(weights)))

    def _terms(self, weights: list[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
        """For each group of matrices of equal shape: their energies, and their positions."""
        groups, positions = by_shape(weights)
        batches = [at_least_float32(torch.stack(group).flatten(0, -3)) for group in groups]
        if self.projection is None and self.groups is None:
            return [self._energy(batch) for batch in batches], positions
        if self.step.device != batches[0].device:
            self.step = self.step.to(batches[0].device)
        if self.groups is not None:
            terms = [self._energy(self._split(batch, self.groups)).mean(-1) for batch in batches]
        else:
            terms = self._projected_terms(batches)
        if self._advances():
            self.step.add_(1)
        return terms, positions

    def _projected_terms(self, batches: list[Tensor]) -> list[Tensor]:
        """The energies of each batch under its projections."""
        families: dict[Any, list[int]] = {}  # of batches that share them
        for index, batch in enumerate(batches):
            kind = (batch.shape[-1], batch.dtype, batch.device) if self.shared_projection else index
            families.setdefault(kind, []).append(index)
        terms: dict[int, Tensor] = {}
        for number, members in enumerate(families.values()):
            projections = self._projections([batches[index] for index in members], number)
            terms |= {index: self._energy(project(batches[index], projections)).mean(-1) for index in members}
        return [terms[index] for index in range(len(batches))]

    def _projections(self, family: list[Tensor], number: int) -> Tensor:
        """(n, p, d), or (B, n, p, d) where each matrix has its own; constant."""
        batch, dim = family[0], family[0].shape[-1]
        own = () if self.shared_projection else (len(batch),)
        shape = (*own, self.num_projections, min(self.projection_dim, dim), dim)
        name, tag = f"projection_{number}", dim if self.shared_projection else number
        known = getattr(self, name, None)
        if known is not None and known.shape != shape:
            raise ValueError(
                f'with projection="angle_preserving" every call must bring the matrices of the first call, whose {name} has '
                f"shape {tuple(known.shape)}, got matrices that need {shape}; use one penalty for each model"
            )
        if known is not None:
            start = known.to(batch)
        else:
            start = normal(self._key(tag, batch.device), math.prod(shape)).view(shape).to(batch.dtype)
        if self.projection == "adversarial":
            return climb(self._mean_energy, family, start, self.projection_steps, self.projection_lr)
        if self.projection == "angle_preserving" and self._advances():
            start = climb(angles_kept, family, start, self.projection_steps, self.projection_lr)
            if known is None:
                self.register_buffer(name, start.clone())
            else:
                known.copy_(start)
        return start

    def _mean_energy(self, batch: Tensor, projections: Tensor) -> Tensor:
        return self._energy(project(batch, projections))

    def _energy(self, batch: Tensor) -> Tensor:
        return mean_energy(batch, self.s, self.angular, self.half_space, self.eps)

    def _split(self, batch: Tensor, groups: int) -> Tensor:
        """(B, K, d) -> (B, groups, K, d // groups), the coordinates in random order; what is left over is dropped."""
        dim = batch.shape[-1]
        if groups > dim:
            raise ValueError(f"groups must be at most dim, the number of columns, got {groups=}, {dim=}")
        order = mix(mix(torch.arange(dim, device=batch.device)) ^ self._key(dim, batch.device)).argsort()
        return rearrange(batch[..., order[: dim // groups * groups]], "b k (g p) -> b g k p", g=groups)

    def _key(self, tag: int, device: torch.device) -> Tensor:
        """What a random number depends on besides its index: the seed, the draw, and the matrices it is for."""
        draw = torch.div(self.step, self.resample_every, rounding_mode="floor").to(device)
        return mix(mix(mix(draw) ^ mix(self.seed + 1)) ^ tag)

    def _advances(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HypersphericalEnergyPenalty:
        """`.to(device)` moves the buffers; `.half()` leaves learned projections in full precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_precision(self, before)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Learned projections exist from the first training call on; a module that has none yet must be able to load them."""
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if self.projection == "angle_preserving" and key.startswith(f"{prefix}projection_") and name not in self._buffers:
                self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        text = f"s={self.s}, angular={self.angular}, half_space={self.half_space}, eps={self.eps}"
        if self.projection is not None:
            text += (
                f", projection={self.projection!r}, projection_dim={self.projection_dim}, "
                f"num_projections={self.num_projections}, shared_projection={self.shared_projection}, "
                f"projection_steps={self.projection_steps}, projection_lr={self.projection_lr}"
            )
        if self.groups is not None:
            text += f", groups={self.groups}"
        random = self.projection is not None or self.groups is not None
        return text + (f", resample_every={self.resample_every}, seed={self.seed}" if random else "")
