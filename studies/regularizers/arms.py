"""What each arm adds to the loss: coefficient * sum of its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the names of the arms are those of a flag, whose help is not to wait for torch
    from torch import Tensor, nn

BASE = "none"
# the public code of both papers: energy of the output layer ten times that of a hidden one
OUTPUT_WEIGHT = 10.0


class Arm(NamedTuple):
    """`published` is the coefficient that the grid is built around; None: there is nothing to choose."""

    published: float | None
    about: str


# Yoshida & Miyato: lambda 0.01, against weight decay 1e-4. No coefficient of Lewandowski et al. carries over to this set-up:
# 1e-3 is ours. MHE and CoMHE: 1 for each hidden layer, 10 for the output layer.
ARMS: dict[str, dict[str, Arm]] = {
    "norm": {
        BASE: Arm(None, "the loss alone"),
        "weight-decay": Arm(1e-4, "+ λ/2 Σ ‖W‖²"),
        "spectral-norm": Arm(0.01, "+ λ/2 Σ σ(W)², one power iteration a step"),
        "spectral-target": Arm(1e-3, "+ λ Σ (σ(W)² − 1)², as in arXiv:2406.06811, without its term for biases"),
    },
    "energy": {
        BASE: Arm(None, "the loss alone"),
        "mhe": Arm(1.0, "+ λ (Σ hidden E + 10 E output), E in the full space, s = 2"),
        "mhe-half": Arm(1.0, "the same, hidden E in the half space"),
        "comhe-random": Arm(1.0, "as mhe-half, rows under 20 random projections, new at every step"),
        "comhe-angle": Arm(1.0, "as mhe-half, rows under an angle-preserving projection"),
        "comhe-adversarial": Arm(1.0, "as mhe-half, rows under an adversarial projection"),
    },
}


class Term(NamedTuple):
    """weight * penalty over the named layers; None: over all convolutions and linear layers."""

    weight: float
    penalty: Callable[[Sequence[Tensor]], Tensor]
    layers: list[str] | None


def terms(arm: str, hidden: list[str], seed: int) -> list[Term]:
    """New penalties, which keep their own state, for one network; `hidden` are the names of its hidden layers in order."""
    if arm in (BASE, "weight-decay"):  # weight decay is the optimizer's
        return []
    from spectral_router import HypersphericalEnergyPenalty, SpectralNormPenalty

    if arm == "spectral-norm":
        return [Term(0.5, SpectralNormPenalty(), None)]
    if arm == "spectral-target":
        return [Term(1.0, SpectralNormPenalty(1, power=2), None)]
    output = Term(OUTPUT_WEIGHT, HypersphericalEnergyPenalty(), ["head"])
    if arm == "mhe":
        return [Term(1.0, HypersphericalEnergyPenalty(), hidden), output]
    plain = HypersphericalEnergyPenalty(half_space=True)
    if arm == "mhe-half":
        return [Term(1.0, plain, hidden), output]
    if arm == "comhe-random":
        compressive = HypersphericalEnergyPenalty(half_space=True, projection="random", seed=seed)
    elif arm == "comhe-angle":
        compressive = HypersphericalEnergyPenalty(half_space=True, projection="angle_preserving", seed=seed)
    else:
        compressive = HypersphericalEnergyPenalty(half_space=True, projection="adversarial", seed=seed)
    # the first layer's filters are too short to project, and are not projected in the public code either
    return [Term(1.0, plain, hidden[:1]), Term(1.0, compressive, hidden[1:]), output]


def penalty(network: nn.Module, parts: list[Term]) -> Tensor:
    """The sum of the terms, unweighted by the arm's coefficient; a scalar."""
    import torch

    from spectral_router import penalize

    return torch.stack([part.weight * penalize(network, part.penalty, part.layers) for part in parts]).sum()
