"""Healthy mixture-of-experts routers: distance-based gates, spectral penalties, load balancing.

Rooms, each with a paragraph at its door: `penalties` read weights, `balance` reads probabilities, `routing` chooses, `gates`
finds the gates of other people's models, `wrap` puts it all on them by hooks, `report` reads checkpoints, `surgery` changes one
path of experts, `integrations` speaks to trainers. Public is what is named here and in `functional`; file names inside the
rooms may change.
"""

from typing import TYPE_CHECKING, Any

from . import functional
from .balance import (
    ImportanceConstraint,
    ImportanceKLLoss,
    LoadBalanceLoss,
    LossFreeBias,
    MutualInformationLoss,
    RouterZLoss,
    SwitchLoss,
)
from .gates import Gate, find_gates
from .penalties import (
    HypersphericalEnergyPenalty,
    OrthogonalityPenalty,
    SpectralNormPenalty,
    SpectralRankPenalty,
    penalize,
    project_spectral_,
)
from .routing import Controller, PrototypeRouter, RouterOutput, rescue_collapsed_, route
from .surgery import ExpertPath, experts_of, load_delta, surgical
from .wrap import MoEHandle, gate_param_groups, wrap_moe

if TYPE_CHECKING:
    from .report import compare_checkpoints, inspect_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Controller",
    "ExpertPath",
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
    "compare_checkpoints",
    "experts_of",
    "find_gates",
    "functional",
    "gate_param_groups",
    "inspect_checkpoint",
    "load_delta",
    "penalize",
    "project_spectral_",
    "rescue_collapsed_",
    "route",
    "surgical",
    "wrap_moe",
]


def __getattr__(name: str) -> Any:
    """Reading checkpoints is not what a training run imports this for: that room opens when it is asked for."""
    if name in ("compare_checkpoints", "inspect_checkpoint"):
        from . import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
