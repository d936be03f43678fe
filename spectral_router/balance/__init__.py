"""What reads PROBABILITIES or logits: balance losses, and controllers that act on the choice without a loss.

In come (tokens, experts) and a mask, out goes a scalar, or logits with closed or shifted experts. Knows of no weight or model.

`formulas` are functions, `losses` the modules around them, `controllers` stand between gate and choice. `ranks` sums over the
processes of a job; `recompute` lets a state move once a step under activation checkpointing.
"""

from .controllers import ImportanceConstraint, LossFreeBias
from .losses import ImportanceKLLoss, LoadBalanceLoss, MutualInformationLoss, RouterZLoss, SwitchLoss

__all__ = [
    "ImportanceConstraint",
    "ImportanceKLLoss",
    "LoadBalanceLoss",
    "LossFreeBias",
    "MutualInformationLoss",
    "RouterZLoss",
    "SwitchLoss",
]
