"""The slow, literal formulas of the paper (arXiv:2601.03889) and of its sisters, in float64, one matrix or one token at a time.

The package is compared to these. They are built for reading: no batching, no shared work, no care for degenerate inputs
beyond what the package documents. Gradients of the spectral values come from autograd through `svdvals`.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def spectral_norm(weight: Tensor) -> Tensor:
    return _each(weight, lambda matrix: torch.linalg.svdvals(matrix)[0])


def stable_rank(weight: Tensor) -> Tensor:
    """Equation 4, |W|_F^2 / sigma_max^2; 0 for the zero matrix."""

    def one(matrix: Tensor) -> Tensor:
        values = torch.linalg.svdvals(matrix)
        if values[0] == 0:
            return 0 * values[0]
        return (values**2).sum() / values[0] ** 2

    return _each(weight, one)


def spectral_rank_penalty(
    weight: Tensor, sigma_target: float = 1.0, rank_target: float | None = None, relative: bool = False, center: bool = False
) -> Tensor:
    """Equations 3 + 5 for each matrix."""
    weight = weight.double()
    rows, columns = weight.shape[-2:]
    if center:
        weight = weight - weight.mean(-2, keepdim=True)
        rows -= 1
    if rank_target is None:
        rank_target = max(1, min(rows, columns))
    sigma_part = spectral_norm(weight) - sigma_target
    rank_part = stable_rank(weight) - rank_target
    if relative:
        sigma_part = sigma_part / sigma_target
        rank_part = rank_part / rank_target
    return sigma_part**2 + rank_part**2


def gradient(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Gradient of the sum of `function(weight)` in float64."""
    leaf = weight.detach().double().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def load_balance_loss(probs: Tensor, mask: Tensor | None = None, unbiased: bool = False) -> float:
    """Equation 6, (std(P) / mean(P))^2 with P_i the mean of probs[..., i] over the tokens that count."""
    num_experts = probs.shape[-1]
    rows = probs.double().reshape(math.prod(probs.shape[:-1]), num_experts).tolist()
    keep = [True] * len(rows) if mask is None else [bool(entry) for entry in mask.reshape(-1).tolist()]
    rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
    if not rows or num_experts == 1:
        return 0.0
    importance = []
    for expert in range(num_experts):
        total = 0.0
        for row in rows:
            total += row[expert]
        importance.append(total / len(rows))
    mean = sum(importance) / num_experts
    variance = 0.0
    for value in importance:
        variance += (value - mean) ** 2
    variance /= num_experts - 1 if unbiased else num_experts
    return variance / mean**2


def scores(x: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    """(T, D), (K, D) -> (T, K), one token and one expert at a time; "sqeuclidean" is the squared distance itself."""
    rows = []
    for token in x.double():
        row = []
        for prototype in prototypes.double():
            if metric == "euclidean":
                score = -(token - prototype).norm()
            elif metric == "sqeuclidean":
                score = -((token - prototype) ** 2).sum()
            elif metric == "cosine":
                score = (token * prototype).sum() / (token.norm() * prototype.norm())
            else:
                score = (token * prototype).sum()
            row.append(score)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def route(x: Tensor, prototypes: Tensor, temperature: float, metric: str) -> Tensor:
    """Equation 2: (T, D), (K, D) -> (T, K) probabilities."""
    rows = []
    for row in scores(x, prototypes, metric) / temperature:
        odds = [torch.exp(score - row.max()) for score in row]
        rows.append(torch.stack([value / sum(odds) for value in odds]))
    return torch.stack(rows)


def _each(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of one matrix to every matrix of (*, m, n)."""
    matrices = weight.double().reshape(-1, *weight.shape[-2:])
    return torch.stack([function(matrix) for matrix in matrices]).reshape(weight.shape[:-2])


def spectral_norm_penalty(weights: list[Tensor], sigma_target: float = 0.0, power: float = 1) -> Tensor:
    """The formula, in float64, one matrix at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        sigma = torch.linalg.svdvals(weight.double().reshape(len(weight), -1))[0]
        total = total + (sigma**power - sigma_target**power) ** 2
    return total


def hyperspherical_energy(weight: Tensor, s: int, angular: bool, half_space: bool) -> Tensor:
    """The mean over all pairs but a row with its own negative, a pair at a time, in float64; none may be closer than EPS."""
    rows = [row / row.norm() for row in weight.double()]
    signs = (1, -1) if half_space else (1,)
    points = [(index, sign * row) for sign in signs for index, row in enumerate(rows)]
    energies = []
    for (i, one), (j, other) in itertools.combinations(points, 2):
        if i != j:
            r = torch.acos(one @ other) if angular else (one - other).norm()
            energies.append(torch.log(1 / r) if s == 0 else r**-s)
    return torch.stack(energies).mean() if energies else 0 * weight.double().sum()
