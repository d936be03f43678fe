"""What reads a router's WEIGHTS: spectral norm and stable rank, energy, orthogonality.

In come matrices (experts, dim), out go scalars with closed-form or plain gradients, or the matrix changed in place
(`project_spectral_`). Knows of no gate, model or probability.

`spectrum` computes singular values and their gradients, for `formulas` (spectral norm, stable rank and their penalty as
functions) and for two modules: `spectral_norm`, and `spectral_rank` with `anchors` (targets taken from the weights) and
`presets` (its settings by name). `energy` has `energy_formula` and `energy_projections`; `orthogonality` and
`project_spectral` are each alone. `groups` batches matrices of one shape for all; `layers` takes a penalty to layers of any
kind.
"""

from .energy import HypersphericalEnergyPenalty
from .layers import penalize
from .orthogonality import OrthogonalityPenalty
from .project_spectral import project_spectral_
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
