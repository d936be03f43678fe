"""The optimizer that steps the gates: whether it can be used, and an update past it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..gates.gate import Gate
from .weights import leaves_of


def check_optimizer(gates: list[Gate], model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that steps the gates, out of the shells of accelerate; or a clear error."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or "DeepSpeed" in type(optimizer).__name__ or "FP16" in type(optimizer).__name__:
            raise TypeError(
                "the optimizer must be a torch.optim.Optimizer that steps the gates' own parameters, got "
                f"{type(optimizer).__name__}; DeepSpeed's ZeRO steps flat copies of them: leave the term in the loss there, "
                "without optimizer="
            )
        optimizer = inner
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise TypeError("optimizer= does not work under ZeRO-3, where parameters are empty at the step; leave it out")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter) for gate in gates for parameter in leaves_of(gate)}
    if own and not held & own:
        raise ValueError(
            f"the optimizer holds no parameter of the gates {', '.join(gate.name for gate in gates[:3])}; make it from "
            "the parameters of the wrapped model, as it is now (after PEFT and sharding)"
        )
    return optimizer


def subtract_(parameter: Tensor, change: Tensor, seed: int) -> None:
    """parameter <- parameter - change, computed in float32 at least.

    A bfloat16 parameter is rounded up or down at random, in proportion: changes below its resolution are right on average.
    The draw depends on `seed` alone, so ranks with equal parameters keep them equal. float16 is rounded to the nearest.
    """
    local, delta = (t.to_local() if hasattr(t, "to_local") else t for t in (parameter.detach(), change))
    if local.dtype != torch.bfloat16:
        local.copy_(local.to(torch.promote_types(local.dtype, torch.float32)) - delta)
        return
    exact = (local.float() - delta.float()).contiguous()
    generator = torch.Generator(device=local.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=local.device, generator=generator)
    # the upper 16 bits of a float32 are the bfloat16 below it in size
    rounded = ((exact.view(torch.int32) + noise) & -65536).view(torch.float32)
    local.copy_(torch.where(exact.isfinite(), rounded, exact))
