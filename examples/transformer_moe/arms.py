"""What each arm adds to the loss. Everything else of the arms is the same: weights to begin with, batches, steps.

none     nothing
own      the model's own auxiliary loss, of its config: experts x sum of shares x probabilities, pooled over the layers
penalty  alpha x SpectralRankPenalty(relative=True): what wrap_moe adds by default, without its balance loss
balance  beta x LoadBalanceLoss(), summed over the layers, without the penalty
both     the two together: wrap_moe(model)
ernie    alpha x OrthogonalityPenalty("ernie")

and where a trained model is fine-tuned, the presets of wrap_moe in their own words:

spread        alpha x the penalty "spread", as in the arm penalty
hold          alpha x the penalty "hold"
hold+balance  wrap_moe(model, penalty="hold")

The coefficients were fixed beforehand: 0.01 is the default of wrap_moe, and what ERNIE 4.5 has for its penalty and Switch
Transformers and OLMoE for the auxiliary loss (Mixtral's config says 0.001).
"""

from __future__ import annotations

from typing import Any, Literal

from examples.shared.command import ExperimentError
from spectral_router import LoadBalanceLoss, MoEHandle, OrthogonalityPenalty, SpectralRankPenalty, wrap_moe

from .config import Config


def attach(model: Any, arm: str, config: Config) -> MoEHandle | None:
    """Make `model` one of `arm`; None where nothing of ours is in it."""
    switches = hasattr(model.config, "router_aux_loss_coef")
    if switches:
        model.config.output_router_logits = arm == "own"
    if arm == "own":
        if not switches:
            raise ExperimentError(f"{type(model).__name__} has no auxiliary loss of its own; leave `own` out of --arms")
        model.config.router_aux_loss_coef = config.own_coef
        # read once, when the model is made, and not from the config
        model.router_aux_loss_coef = config.own_coef
    if arm in ("none", "own"):
        return None
    penalty: SpectralRankPenalty | OrthogonalityPenalty | Literal["hold"] | None = None
    if arm in ("penalty", "spread", "both"):
        penalty = SpectralRankPenalty(config.sigma_target, relative=True)  # type: ignore[arg-type]
    elif arm in ("hold", "hold+balance"):
        penalty = "hold"
    elif arm == "ernie":
        penalty = OrthogonalityPenalty("ernie")
    # with sync it is the loss of the global batch on any number of processes
    balance = LoadBalanceLoss(sync=True) if arm in ("balance", "both", "hold+balance") else None
    return wrap_moe(model, penalty=penalty, balance=balance, penalty_coef=config.alpha, balance_coef=config.beta)
