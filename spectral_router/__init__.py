"""Healthy mixture-of-experts routers: distance-based gates, spectral penalties, load balancing."""

from . import functional
from .energy import HypersphericalEnergyPenalty
from .gates import Gate, find_gates
from .layers import penalize
from .losses import LoadBalanceLoss
from .norm_penalty import SpectralNormPenalty
from .penalties import SpectralRankPenalty
from .router import PrototypeRouter, RouterOutput
from .wrap import MoEHandle, wrap_moe

__version__ = "0.1.0"

__all__ = [
    "Gate",
    "HypersphericalEnergyPenalty",
    "LoadBalanceLoss",
    "MoEHandle",
    "PrototypeRouter",
    "RouterOutput",
    "SpectralNormPenalty",
    "SpectralRankPenalty",
    "find_gates",
    "functional",
    "penalize",
    "wrap_moe",
]
