"""Healthy mixture-of-experts routers: distance-based gates, spectral penalties, load balancing."""

from . import functional
from ._route import Controller, RouterOutput, route
from .controllers import ImportanceConstraint, LossFreeBias
from .energy import HypersphericalEnergyPenalty
from .gates import Gate, find_gates
from .layers import penalize
from .losses import ImportanceKLLoss, LoadBalanceLoss, MutualInformationLoss, RouterZLoss, SwitchLoss
from .norm_penalty import SpectralNormPenalty
from .orthogonality import OrthogonalityPenalty
from .penalties import SpectralRankPenalty
from .projection import project_spectral_
from .rescue import rescue_collapsed_
from .router import PrototypeRouter
from .wrap import MoEHandle, wrap_moe

__version__ = "0.1.0"

__all__ = [
    "Controller",
    "Gate",
    "HypersphericalEnergyPenalty",
    "ImportanceConstraint",
    "ImportanceKLLoss",
    "LoadBalanceLoss",
    "LossFreeBias",
    "MoEHandle",
    "MutualInformationLoss",
    "OrthogonalityPenalty",
    "PrototypeRouter",
    "RouterOutput",
    "RouterZLoss",
    "SpectralNormPenalty",
    "SpectralRankPenalty",
    "SwitchLoss",
    "find_gates",
    "functional",
    "penalize",
    "project_spectral_",
    "rescue_collapsed_",
    "route",
    "wrap_moe",
]
