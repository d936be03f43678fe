"""What the user of a wrapped model is told, each thing once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..balance.formulas import router_z_loss
from ..balance.losses import RouterZLoss
from ..gates.gate import Gate
from ..gates.quantised import quantised
from ..penalties.formulas import stable_rank
from .second_loss import engines_own
from .weights import learns_from

# So many forwards in a row whose loss saw no backward are taken as a sign that nobody uses that loss.
UNUSED = 8
# A stable rank below this part of what a random matrix of the shape has is taken as a sign of training.
TRAINED = 0.5


class Advice:
    """Warnings about one wrapped model."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, kind: str) -> bool:
        """Whether this is the first time."""
        first = kind not in self._said
        self._said.add(kind)
        return first

    def said(self, kind: str) -> bool:
        return kind in self._said

    def say(self, kind: str, message: str) -> None:
        if self.once(kind):
            warnings.warn(message, stacklevel=2)

    def at_wrapping(self, model: nn.Module, balance: object) -> None:
        if any(getattr(config, "output_router_logits", False) for config in _configs(model)):
            self.own_loss(model, balance)
        own = engines_own(model)
        if own and not _balances_nothing(balance):
            self.say(
                "engine's own",
                f"the engine balances too: {', '.join(own)}; switch it off ({', '.join(own.values())}), or wrap with "
                "balance=None",
            )
        compiled = [
            name or type(model).__name__
            for name, module in model.named_modules()
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        ]
        if compiled:
            self.compiled(compiled)

    @torch.no_grad()
    def trained_gates(self, gates: list[Gate]) -> None:
        """For a penalty that pulls the stable rank up to the largest. Weights that are sharded or not here yet are not read."""
        low = []
        for gate in filter(_is_here, gates):
            rank, usual = stable_rank(gate.weight).item(), _random_rank(gate)
            if 0 < rank < TRAINED * usual:  # a zero matrix is as new as can be
                low.append((rank / usual, rank, usual, gate))
        if low:
            _, rank, usual, gate = min(low, key=lambda entry: entry[0])
            largest = min(gate.num_experts, gate.dim)
            self.say(
                "trained",
                f"{len(low)} of {len(gates)} gates look trained: stable rank {rank:.1f} of {largest} in {gate.name}, where a "
                f'random matrix has about {usual:.1f}. penalty="spread", the default, pulls it up to {largest} and so reshapes '
                'the routing; penalty="hold" keeps it where it is. To spread it all the same pass '
                'SpectralRankPenalty("initial", relative=True)',
            )

    def compiled(self, names: Iterable[str]) -> None:
        self.say(
            "compiled",
            f"compiled before wrap_moe: {', '.join(names)}; what has run compiled already does not see the hooks: wrap "
            "first, or call torch._dynamo.reset()",
        )

    def own_loss(self, model: nn.Module, balance: object) -> None:
        if _balances_nothing(balance):
            return
        coefs = {k: v for config in _configs(model) for k, v in vars(config).items() if k.endswith("aux_loss_coef") and v}
        if coefs:
            settings = ", ".join(f"{key}={value}" for key, value in coefs.items())
            self.say(
                "native",
                f"the model's own balance loss is on too (output_router_logits=True, {settings}); set "
                "router_aux_loss_coef=0.0 (which holds where a trainer sets output_router_logits itself), or wrap with "
                "balance=None",
            )

    def before_forward(self, term_left: bool, without_backward: int) -> None:
        if self.said("lost"):
            return
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

    def replaced(self, names: list[str]) -> None:
        if names:
            self.say(
                "replaced",
                f"these gates are no longer in the model, their modules were replaced since wrap_moe: {', '.join(names)}; "
                "nothing is added for them: call handle.remove() and wrap_moe again, after the engine is set up",
            )

    def after_first_forward(self, gates: list[tuple[Gate, bool]]) -> None:
        """Of the gates of this part, each with whether it ran."""
        stored = [gate.name for gate, _ in gates if quantised(gate.matrix)]
        buffers = [gate.name for gate, _ in gates if gate.buffered and gate.name not in stored]
        frozen = [gate.name for gate, _ in gates if not learns_from(gate) and gate.name not in stored]
        idle = [gate.name for gate, ran in gates if not ran and gate.name not in (*frozen, *stored)]
        if buffers:
            self.say(
                "buffers",
                f"the matrix is a buffer, which is read and does not learn, so it is not penalised, and the balance in the "
                f"loss moves only what lies before it: {', '.join(buffers)}; make it a parameter, or leave the gate out with "
                f"exclude={buffers}",
            )
        if stored:
            self.say(
                "quantised",
                f"quantised gates are read but left alone, as their whole numbers do not learn: {', '.join(stored)}; keep "
                "them out of the quantisation (torchao: filter_fn of quantize_; transformers: modules_to_not_convert)",
            )
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

    def evaluation(self, model: str) -> None:
        self.say(
            "evaluation",
            f"a backward has reached the loss of {model} in eval mode, where the routers' term is left out; call model.train()",
        )

    def lost(self, model: str, forwards: int, unseen: bool) -> None:
        self.say(
            "lost",
            f"the optimizer steps the gates of {model}, but no training forward has run the hooks of wrap_moe; code compiled "
            "before, for a model of the same class, may be in use: call torch._dynamo.reset() after wrapping"
            if unseen
            else f"the optimizer steps the gates of {model}, but the routers' term of its {forwards} training forward(s) since "
            "the last step has had no backward: the loop (trainer) builds its own loss. Deliver at the step, wrap_moe(model, "
            "optimizer=optimizer) or handle.attach(optimizer), or add handle.loss() to that loss after each forward",
        )

    def not_at_step(self, gate: str) -> None:
        self.say(
            f"not at step {gate}",
            f"gate {gate!r} hands out probabilities or logits that are not W x + b, so at the optimizer's step its weight is "
            "penalised and its balance is not; leave the term in the loss if you need it",
        )

    def outside(self, gate: str, model: str) -> None:
        self.say(
            "outside",
            f"gate {gate!r} ran in training, but outside a call of the wrapped {model}, so nothing is recorded; wrap the "
            "module that your loop calls (a PEFT model, say, instead of its base)",
        )


def _balances_nothing(balance: object) -> bool:
    return balance is None or balance is router_z_loss or isinstance(balance, RouterZLoss)


def _configs(model: nn.Module) -> list[Any]:
    """The config of a transformers model and, where there are several modalities, that of its text part."""
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    return [config for config in configs if hasattr(config, "__dict__")]


def _is_here(gate: Gate) -> bool:
    matrix = gate.matrix
    whole = type(matrix) in (torch.Tensor, nn.Parameter) and matrix.numel() >= gate.num_experts * gate.dim
    return whole and matrix.is_floating_point() and not matrix.is_meta


def _random_rank(gate: Gate) -> float:
    """Of a large random K x d matrix with independent entries of size one: its σ_max is near √K + √d."""
    return gate.num_experts * gate.dim / (gate.num_experts**0.5 + gate.dim**0.5) ** 2
