"""The numbers of one gate that need its matrix alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..penalties.energy_formula import cosines, mean_energy

# what a fresh gate of the same shape is asked for too: numbers that no scale changes
SCALE_FREE = ("stable_rank", "effective_rank", "condition", "centred_stable_rank", "energy", "closest", "quietest", "loudest")


@dataclass(frozen=True, eq=False)
class Geometry:
    """How the rows of a gate's matrix W lie, one row an expert.

    spectral_norm: σ_max(W).
    stable_rank: ‖W‖_F² / σ_max², in [1, min(K, d)].
    effective_rank: exp of the entropy of σ_i / Σσ, in [1, min(K, d)] (Roy & Vetterli 2007).
    condition: σ_max / σ_min over min(K, d) values; inf from 1e7 on, where it is rounding.
    centred_stable_rank: of W less its mean row, which no softmax sees; in [1, min(K - 1, d)], 0 if all rows are equal.
    common: the mean row's part of ‖W‖_F², in [0, 1].
    energy: mean over pairs of rows of 1 / r², r their distance on the unit sphere.
    row_norms: (K,).
    cosines: (K, K).
    distances: (K, K), ‖W_i − W_j‖.
    closest: least distance over the median one, in [0, 1].
    quietest, loudest: the shortest and the longest row over the median one.
    """

    spectral_norm: float
    stable_rank: float
    effective_rank: float
    condition: float
    centred_stable_rank: float
    common: float
    energy: float
    row_norms: Tensor
    cosines: Tensor
    distances: Tensor
    closest: float
    quietest: float
    loudest: float


@torch.no_grad()
def geometry(weight: Tensor) -> Geometry:
    """The numbers of a finite matrix (K, d), from its Gram matrix in float64."""
    rows = weight.detach().double()
    count = len(rows)
    gram = rows @ rows.mT
    energy, values = gram.trace(), _singular(gram, rows.shape[1])
    mean = rows.mean(0)
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    spread = _singular(centred, rows.shape[1])
    norms = gram.diagonal().sqrt()
    apart = _distances(rows, gram)
    pairs = apart[~torch.eye(count, dtype=torch.bool)]
    median = pairs.median() if len(pairs) else apart.new_zeros(())
    middle = norms.median()
    shares = values / values.sum().clamp_min(1e-300)
    return Geometry(
        spectral_norm=values[0].item(),
        stable_rank=_over(energy, values[0] ** 2),
        effective_rank=torch.special.entr(shares).sum().exp().item() if energy > 0 else 0.0,
        condition=_over(values[0], values[-1]) if values[-1] > 1e-7 * values[0] else float("inf"),
        centred_stable_rank=_over(spread.square().sum(), spread[0] ** 2) if _any(spread, values) else 0.0,
        common=_over(count * mean.square().sum(), energy),
        energy=mean_energy(rows, 2, False, False, 1e-4).item(),
        row_norms=norms.float(),
        cosines=cosines(rows).float().clamp(-1, 1),
        distances=apart.float(),
        closest=_over(pairs.min(), median) if len(pairs) else 1.0,
        quietest=_over(norms.min(), middle),
        loudest=_over(norms.max(), middle),
    )


def _singular(gram: Tensor, dim: int) -> Tensor:
    return torch.linalg.eigvalsh(gram).flip(0)[: min(len(gram), dim)].clamp_min(0).sqrt()


def _any(spread: Tensor, values: Tensor) -> bool:
    """Whether more than rounding is left of the rows without their mean."""
    return bool(spread[0] > 1e-7 * values[0])


def _distances(rows: Tensor, gram: Tensor) -> Tensor:
    squared = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    apart = squared.clamp_min(0).sqrt()
    # of near-equal rows the difference of squares is rounding
    near = (squared < 1e-8 * gram.diagonal()[:, None]).nonzero()
    for i, j in near.tolist() if len(near) <= 4 * len(rows) else ():
        apart[i, j] = (rows[i] - rows[j]).norm()
    return apart.fill_diagonal_(0)


def _over(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0
