"""`compare_checkpoints`: how far every router of one checkpoint is from the same router of another."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .certified import certified
from .gate_report import GateReport
from .inspection import CheckpointReport, inspect_checkpoint

_SAME = 1e-7  # relative change below which nothing was trained
_CANDIDATES = 0.125  # share of the experts that is listed for pruning
_SMALL = 0.5  # of the median change


@dataclass(eq=False)
class GateDrift:
    """One router before (W) and after (W').

    change: ‖W' − W‖_F / ‖W‖_F.
    row_cosines: (K,), of each row with itself.
    angles: principal angles between the row spaces, in radians, the largest first; of min(K, d) directions, all 0 if K >= d.
    moved: (K,), ‖W'_i − W_i‖. norm_change: (K,), ‖W'_i‖ − ‖W_i‖.
    certified_share: share of rows that moved by less than half their distance to every other row of W; each of these is nearer
        to its own old place than to any other's.
    taken: (i, j): the new row i is nearest to the old row j, another's. swapped: pairs that took each other's place.
    pruning: (expert, reason), of the smallest change first (arXiv:2405.16646).
    """

    name: str
    layer: int | None
    before: GateReport
    after: GateReport
    change: float
    row_cosines: Tensor
    angles: Tensor
    moved: Tensor
    norm_change: Tensor
    certified_share: float
    taken: list[tuple[int, int]]
    swapped: list[tuple[int, int]]
    pruning: list[tuple[int, str]]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON knows them."""
        ranks = [None if g.geometry is None else g.geometry.stable_rank for g in (self.before, self.after)]
        norms = [None if g.geometry is None else g.geometry.spectral_norm for g in (self.before, self.after)]
        return {
            "name": self.name,
            "layer": self.layer,
            "change": self.change,
            "certified_share": self.certified_share,
            "stable_rank": ranks,
            "spectral_norm": norms,
            "row_cosines": self.row_cosines.tolist(),
            "principal_angles": self.angles.tolist(),
            "moved": self.moved.tolist(),
            "norm_change": self.norm_change.tolist(),
            "taken": self.taken,
            "swapped": self.swapped,
            "pruning": [{"expert": expert, "reason": reason} for expert, reason in self.pruning],
            "verdict": [self.before.verdict, self.after.verdict],
        }


@dataclass(eq=False)
class Comparison:
    """Two checkpoints of one model; gates: one `GateDrift` a router."""

    before: CheckpointReport
    after: CheckpointReport
    gates: list[GateDrift]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        return {
            "before": self.before.path,
            "after": self.after.path,
            "notes": [*self.before.notes, *self.after.notes],
            "gates": [gate.to_dict() for gate in self.gates],
        }


def compare_checkpoints(
    before: str | os.PathLike[str], after: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """How far every router of `after` is from that of `before`; both are read as by `inspect_checkpoint`.

    Args:
        before: the base model, or the earlier checkpoint.
        after: what training made of it, in any format.
        progress: called with the number of gates done and of all, for each checkpoint.

    Raises:
        ValueError: as `inspect_checkpoint`; or the two are different models.
        ModuleNotFoundError: a format needs a package that is missing.
    """
    return drift(inspect_checkpoint(before, progress=progress), inspect_checkpoint(after, progress=progress))


def drift(before: CheckpointReport, after: CheckpointReport) -> Comparison:
    """The comparison of two reports."""
    if before.family and after.family and before.family != after.family:
        raise ValueError(f"{before.path} and {after.path} are different models: {before.family} and {after.family}")
    old = {gate.name: gate for gate in before.gates}
    new = {gate.name: gate for gate in after.gates}
    if old.keys() != new.keys() and [_shape(g) for g in before.gates] == [_shape(g) for g in after.gates]:
        new = dict(zip(old, after.gates, strict=True))  # the same model under other names
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise ValueError(
            f"{before.path} and {after.path} are different models: {len(old)} gates and {len(new)}, and only one has {odd[0]!r}"
        )
    for name, gate in old.items():
        if _shape(gate) != _shape(new[name]):
            (rows, columns), (k, d) = _shape(gate), _shape(new[name])
            raise ValueError(
                f"{before.path} and {after.path} are different models: gate {name!r} is {rows} x {columns} in "
                f"one, {k} x {d} in the other"
            )
    return Comparison(before, after, [_drift_of(gate, new[name]) for name, gate in old.items()])


def _shape(gate: GateReport) -> tuple[int, int]:
    return gate.num_experts, gate.dim


@torch.no_grad()
def _drift_of(before: GateReport, after: GateReport) -> GateDrift:
    old, new = before.weight.double(), after.weight.double()
    moved = (new - old).norm(dim=-1)
    norms = new.norm(dim=-1) - old.norm(dim=-1)
    apart = torch.cdist(old, old, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = torch.cdist(new, old, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    taken = [(i, j) for i, j in enumerate(nearest.tolist()) if i != j]
    change = (moved.norm() / old.norm().clamp_min(1e-300)).item()
    return GateDrift(
        before.name,
        before.layer,
        before,
        after,
        change,
        ((new * old).sum(-1) / (new.norm(dim=-1) * old.norm(dim=-1)).clamp_min(1e-300)).float(),
        _angles(old, new).float(),
        moved.float(),
        norms.float(),
        certified(moved, apart).double().mean().item(),
        taken,
        [(i, j) for i, j in taken if i < j and (j, i) in taken],
        _pruning(norms.abs(), old.norm(dim=-1)) if change > _SAME else [],
    )


def _angles(old: Tensor, new: Tensor) -> Tensor:
    """Principal angles, by the sine where the cosine is flat."""
    if not (old.isfinite().all() and new.isfinite().all()):
        return old.new_full((min(old.shape),), torch.nan)
    one, other = _basis(old), _basis(new)
    size = min(one.shape[1], other.shape[1])
    if not size:
        return old.new_zeros(0)
    inner = one.mT @ other
    cosines = torch.linalg.svdvals(inner)[:size].clamp(0, 1).flip(0)
    sines = torch.linalg.svdvals(other - one @ inner if one.shape[1] >= other.shape[1] else one - other @ inner.mT)
    sines = sines[:size].clamp(0, 1)
    return torch.where(cosines > 0.7, sines.asin(), cosines.acos())


def _basis(rows: Tensor) -> Tensor:
    """(d, rank), orthonormal."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > 1e-7 * values[0]].mT if len(values) else vectors.mT


def _pruning(change: Tensor, norms: Tensor) -> list[tuple[int, str]]:
    """Experts whose rows' lengths changed least, if that is little beside what is usual."""
    count = max(1, int(len(change) * _CANDIDATES))
    median = change.median()
    told = []
    for i in change.argsort()[:count].tolist():
        if change[i] < _SMALL * median:
            own = change[i] / norms[i].clamp_min(1e-300)
            told.append((i, f"its row's length changed by {own:.2%}, {change[i] / median:.0%} of the median change"))
    return told
