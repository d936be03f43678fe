"""Healthy mixture-of-experts routers: distance-based gates, spectral penalties, load balancing.

Rooms, each with a paragraph at its door: `penalties` read weights, `balance` reads probabilities, `routing` chooses, `gates`
finds the gates of other people's models, `wrap` puts it all on them by hooks, `report` reads checkpoints, `surgery` changes one
path of experts, `integrations` speaks to trainers. Public is what is named here and in `functional`; file names inside the
rooms may change.
"""

from importlib import import_module
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
from .wrap import MoEHandle, gate_param_groups, wrap_moe

if TYPE_CHECKING:
    from .report import compare_checkpoints, inspect_checkpoint
    from .surgery import ExpertPath, experts_of, load_delta, surgical

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


# rooms that a training run has no use for open when a name of theirs is asked for
_LATER = {
    "ExpertPath": "surgery",
    "compare_checkpoints": "report",
    "experts_of": "surgery",
    "inspect_checkpoint": "report",
    "load_delta": "surgery",
    "surgical": "surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
