"""Nothing off a path changes while a guard is up: not by gradients, weight decay, momentum or an optimizer's own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .part import Region
from .usage import put_back

# of one parameter: what of it, and of its optimizer's state by name, may not change
Kept = dict[str | None, Tensor]


class Guard:
    """Freezes what is off the path, and around every optimizer step keeps the slices off the path of stacked parameters.

    Gradients of those slices are zeroed as they arrive, so that clipping does not see them. Around a step, which decays weights
    and moves by momentum all the same, the slices and their part of the optimizer's state are set aside and put back.
    The hooks are torch's for all optimizers, so that it does not matter who makes the optimizer, and when.
    """

    def __init__(self, model: nn.Module, regions: Mapping[nn.Parameter, Region | None], freeze: bool) -> None:
        self.model, self.freeze = model, freeze
        own = list(dict.fromkeys(model.parameters()))
        self.on = {parameter: regions[parameter] for parameter in own if parameter in regions}
        self.off = dict.fromkeys(parameter for parameter in own if parameter not in regions)
        self.steps = 0  # of optimizers that hold something of the path
        self.foreign = 0  # of others
        self._kept: dict[int, dict[nn.Parameter, Kept]] = {}
        self._hooks: list[Any] = []

    def raise_(self) -> None:
        """Put the guard up."""
        everything = [*self.on, *self.off]
        self._before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        for parameter in everything:
            parameter.grad = None
        if self.freeze:
            for parameter in self.off:
                parameter.requires_grad_(False)
        # an adapter's layers train, and what it adapts stays frozen; of a frozen model the path is thawed
        if not any(parameter.requires_grad for parameter in self.on):
            for parameter in self.on:
                parameter.requires_grad_(parameter.is_floating_point())
        for parameter, region in self.on.items():
            if region is not None and parameter.requires_grad:
                self._hooks.append(parameter.register_hook(_Masked(region)))
        self._hooks.append(register_optimizer_step_pre_hook(self._before_step))
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))
        if self.freeze and _reentrant(self.model):
            self._hooks += [
                module.register_forward_hook(_ask_gradient)
                for module in self.model.modules()
                if isinstance(module, nn.Embedding)
            ]

    def lower(self) -> None:
        """Take it down; what required a gradient, and the gradients and buffers from before, are as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._kept = {}
        for parameter, required, gradient in self._before:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient
        put_back(self._buffers)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept: dict[nn.Parameter, Kept] = {}
        for parameter in held:
            if parameter in self.off:
                parameter.grad = None  # without one an optimizer passes it by, its decay and state too
            elif (region := self.on.get(parameter)) is not None:
                if parameter.grad is not None and parameter.grad.layout is torch.strided:
                    region.put_outside(parameter.grad, 0.0)  # those of sharding engines pass no hook
                kept[parameter] = {None: region.outside(parameter)}
                for name, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and region.fits(value):
                        kept[parameter][name] = region.outside(value)
        self._kept[id(optimizer)] = kept
        if any(parameter in self.on for parameter in held):
            self.steps += 1
        elif any(parameter in self.off for parameter in held):
            self.foreign += 1

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, kept in self._kept.pop(id(optimizer), {}).items():
            region = self.on[parameter]
            assert region is not None
            region.put_outside(parameter, kept[None])
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and region.fits(value):
                    # new state is what it is before the first step: nothing
                    region.put_outside(value, kept.get(name, 0.0))


class _Masked:
    """A hook on a gradient."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, gradient: Tensor) -> Tensor:
        strange = gradient.layout is not torch.strided or hasattr(gradient, "to_local")
        return gradient if strange else self.region.only(gradient)


def _ask_gradient(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_leaf:
        output.requires_grad_(True)


def _reentrant(model: nn.Module) -> bool:
    """Whether transformers' reentrant checkpointing is on, which gives no gradient to layers whose input asks for none."""
    for module in model.modules():
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            return True
    return False
