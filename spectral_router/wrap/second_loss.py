"""Balance losses that an engine's own blocks have on, by their attributes."""

from __future__ import annotations

from typing import Any

from torch import nn


def engines_own(model: nn.Module) -> dict[str, str]:
    """What is on, by the name of its setting, and how it is switched off; each once, however many blocks have it."""
    found: dict[str, str] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        coef, kind = getattr(config, "moe_aux_loss_coeff", 0), getattr(config, "moe_router_load_balancing_type", "none")
        if any(coef if isinstance(coef, (list, tuple)) else [coef]) and kind != "none":
            found[f"Megatron's moe_aux_loss_coeff={coef}"] = "moe_aux_loss_coeff=0.0"
        if getattr(module, "lb_loss_weight", None):  # OLMo-core's routers
            found[f"OLMo-core's lb_loss_weight={module.lb_loss_weight}"] = "lb_loss_weight=None in its MoEConfig"
        if getattr(module, "load_balance_coeff", None) and hasattr(module, "tokens_per_expert_E"):
            found[f"torchtitan's bias, load_balance_coeff={module.load_balance_coeff}"] = "load_balance_coeff=None"
        if hasattr(module, "deepspeed_moe"):
            found["the l_aux that DeepSpeed's MoE layers return, if your loss adds it"] = "leave l_aux out of the loss"
    return found
