"""The maths of SR-MoE on tensors, equations 3 to 6, and of its relatives, each as one function.

A face, with no code of its own: `penalties`, `balance` and `routing` hold the formulas. Inside the package nothing imports it.
"""

from .balance.formulas import importance_kl_loss, load_balance_loss, mutual_information_loss, router_z_loss, switch_loss
from .penalties.energy_formula import hyperspherical_energy
from .penalties.formulas import spectral_norm, spectral_rank_penalty, stable_rank
from .penalties.orthogonality import orthogonality
from .routing.radius import choice_radius

__all__ = [
    "choice_radius",
    "hyperspherical_energy",
    "importance_kl_loss",
    "load_balance_loss",
    "mutual_information_loss",
    "orthogonality",
    "router_z_loss",
    "spectral_norm",
    "spectral_rank_penalty",
    "stable_rank",
    "switch_loss",
]
