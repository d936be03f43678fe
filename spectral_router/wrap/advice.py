"""What the user of a wrapped model is told, each thing once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..balance.formulas import router_z_loss
from ..balance.losses import RouterZLoss

# So many forwards in a row whose loss saw no backward are taken as a sign that nobody uses that loss.
UNUSED = 8


class Advice:
    """Warnings about one wrapped model."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, kind: str) -> bool:
        """Whether this is the first time."""
        first = kind not in self._said
        self._said.add(kind)
        return first

    def say(self, kind: str, message: str) -> None:
        if self.once(kind):
            warnings.warn(message, stacklevel=2)

    def at_wrapping(self, model: nn.Module, balance: object) -> None:
        if any(getattr(config, "output_router_logits", False) for config in _configs(model)):
            self.own_loss(model, balance)
        compiled = [
            name or type(model).__name__
            for name, module in model.named_modules()
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        ]
        if compiled:
            self.compiled(compiled)

    def compiled(self, names: Iterable[str]) -> None:
        self.say(
            "compiled",
            f"compiled before wrap_moe: {', '.join(names)}; what has run compiled already does not see the hooks: wrap "
            "first, or call torch._dynamo.reset()",
        )

    def own_loss(self, model: nn.Module, balance: object) -> None:
        if balance is None or balance is router_z_loss or isinstance(balance, RouterZLoss):  # which balance nothing
            return
        coefs = {k: v for config in _configs(model) for k, v in vars(config).items() if k.endswith("aux_loss_coef") and v}
        if coefs:
            settings = ", ".join(f"{key}={value}" for key, value in coefs.items())
            self.say(
                "native",
                f"the model's own balance loss is on too (output_router_logits=True, {settings}); set "
                "config.output_router_logits=False, or wrap with balance=None",
            )

    def before_forward(self, term_left: bool, without_backward: int) -> None:
        if term_left:
            self.say(
                "unused",
                "the term of the last forward was not used: the model's output carries no loss that it could be added to, so "
                "add handle.loss() to yours after each forward",
            )
        if without_backward == UNUSED:
            self.say(
                "no backward",
                f"no backward has reached the loss that the model returned, with the term in it, for {UNUSED} forwards; if "
                "your loop computes its own loss, wrap with add_to_loss=False and add handle.loss()",
            )

    def after_first_forward(self, frozen: list[str], idle: list[str]) -> None:
        if frozen:
            self.say(
                "frozen",
                f"frozen gates are left alone, as nothing of them can learn: {', '.join(frozen)}; where PEFT adapts them, wrap "
                "the PEFT model, not its base",
            )
        if idle:
            self.say(
                "idle",
                f"these gates did not run in the first training forward, are in eval mode, or are bypassed: {', '.join(idle)}; "
                "their weights are penalised, their balance is not",
            )

    def outside(self, gate: str, model: str) -> None:
        self.say(
            "outside",
            f"gate {gate!r} ran in training, but outside a call of the wrapped {model}, so nothing is recorded; wrap the "
            "module that your loop calls (a PEFT model, say, instead of its base)",
        )


def _configs(model: nn.Module) -> list[Any]:
    """The config of a transformers model and, where there are several modalities, that of its text part."""
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    return [config for config in configs if hasattr(config, "__dict__")]
