"""What reads PROBABILITIES or logits: balance losses, and controllers that act on the choice without a loss.

In come (tokens, experts) and a mask, out goes a scalar, or logits with closed or shifted experts. Knows of no weight or model.
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
