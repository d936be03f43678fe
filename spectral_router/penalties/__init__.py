"""What reads a router's WEIGHTS: spectral norm and stable rank, energy, orthogonality.

In come matrices (experts, dim), out go scalars with closed-form or plain gradients, or the matrix changed in place
(`project_spectral_`). Knows of no gate, model or probability.
"""

from .energy import HypersphericalEnergyPenalty
from .layers import penalize
from .orthogonality import OrthogonalityPenalty
from .projection import project_spectral_
from .spectral_norm import SpectralNormPenalty
from .spectral_rank import SpectralRankPenalty

__all__ = [
    "HypersphericalEnergyPenalty",
    "OrthogonalityPenalty",
    "SpectralNormPenalty",
    "SpectralRankPenalty",
    "penalize",
    "project_spectral_",
]
