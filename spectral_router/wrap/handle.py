"""What `wrap_moe` hands back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..gates.names import bare_text
from ..gates.select import Selector, select_gates
from .at_step import AtStep
from .delivery import share_above
from .examined import examine
from .hooks import AtGate, Hook
from .metrics import measure
from .optimizer import check_optimizer
from .recorder import Recorder
from .state import check_state, restore, tensors
from .step import Step, Tap
from .weights import tied

Penalty = Callable[[Sequence[Tensor]], Tensor]
Balance = Callable[[Tensor, "Tensor | None"], Tensor]


class MoEHandle(Recorder):
    """What `wrap_moe` attached to a model: its term, its measurements, and the way back.

    Attributes:
        model: the wrapped model.
        gates: the list of `Gate`, in the order of the model.
        penalty, balance: the two callables, or None; others may be put in their place between steps.
        penalty_coef, balance_coef: α and β of equation 7; plain floats that may be changed between steps.

    `print(handle)` is a table of the gates. As a context manager it removes itself at the end.
    """

    # unpickled in a new process, these raise torch's counter of hooks there, so that a later hook does not replace ours
    registrations: list[RemovableHandle]
    _selectors: tuple[Selector | None, Selector | None] = None, None  # which gates were asked for

    def _hook(self, tap: Tap) -> RemovableHandle:
        # first of the module's hooks: sharding engines free the weight in theirs
        return tap.gate.module.register_forward_hook(AtGate(self, tap), with_kwargs=True, prepend=True)

    def _find_replaced(self) -> None:
        """Gates whose module an engine has put another one in the place of, since wrapping: hook that one, or say so."""
        there = {id(module) for module in self.model.modules()}
        gone = [tap for tap in self.taps if id(tap.gate.module) not in there]
        if not gone:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = {gate.name: gate for gate in select_gates(self.model, *self._selectors)}
            except (TypeError, ValueError):  # `Gate` objects of modules that are gone
                found = {}
        for tap in gone:
            block = (
                tap.gate.name.rpartition(".")[0] + "."
            )  # a new block may call its gate otherwise, as DeepSpeed's AutoEP does
            near = [gate for name, gate in found.items() if name.startswith(block)]
            new = found.get(tap.gate.name) or (near[0] if len(near) == 1 else None)
            if new is None or (new.num_experts, new.dim) != (tap.gate.num_experts, tap.gate.dim):
                tap.gone = True
                continue
            new.name = tap.gate.name
            self.gates[self.gates.index(tap.gate)] = tap.gate = new
            self.registrations.append(self._hook(tap))
        self.ties = tied(self.gates)
        self.advice.replaced([tap.gate.name for tap in gone if tap.gone])

    @classmethod
    def of(cls, model: nn.Module) -> MoEHandle | None:
        """The handle of a wrapped model, None if it is not wrapped. A copy of a wrapped model, or one loaded from a file, has
        a handle of its own."""
        return next((hook.handle for _, _, hook in _hooks_below(model) if isinstance(hook.handle, cls)), None)

    def loss(self, share: float | None = None) -> Tensor:
        """The term of the last training forward: `penalty_coef` x penalty + `balance_coef` x the sum of the balance losses.

        For models that return no loss, or under `add_to_loss=False`: add it to your own loss, once a forward. After a forward
        in evaluation it is 0, so that a loop may share its loss function.

        Args:
            share: the fraction of the optimizer step that this forward stands for, in (0, 1]: 1 / accumulation where your loop
                sums the losses of its micro-batches, 1 where it averages them. None is 1, but inside of transformers' Trainer
                what its own rule for the loss says.

        Raises:
            RuntimeError: the term is in the model's loss already, was taken already, there was no training forward, or the
                handle was removed.
        """
        self.still_there()
        term, fate = self.step.term, self.step.fate
        if term is None and self.step.evaluated and not self.step.fate:
            return torch.zeros((), device=self.device)
        if term is None:
            why = (
                f"the term of the last training forward {fate}"
                if fate
                else "the last forward was not one in training, with gradients"
            )
            raise RuntimeError(f"handle.loss() has no term to give: {why}")
        if share is None:
            share = 1.0 if self.step.shared else share_above()
        elif not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], the fraction of the step that this forward stands for, got {share=}")
        term = term if share == 1.0 else term * share
        self.step.term, self.step.fate = None, "was taken by handle.loss() already; call it once a forward"
        return term

    def attach(self, optimizer: Any, *, decoupled: bool = False, every: int = 1, group: Any = None) -> None:
        """Deliver the term at the optimizer's step from now on, in place of the loss.

        Right before each `optimizer.step()`, after clipping, the gradient of the term is added to the gates' gradients: that of
        the penalty in closed form, once a step; that of the balance losses with respect to each gate's own matrix and bias, the
        mean over the forwards since the last step (and over ranks, by one all-reduce). So it does not matter who builds the
        loss, or by what it is scaled, summed or accumulated.

        NOTE[DIFF]: In the loss, a balance loss also moves what lies before the gate; delivered at the step, the gate only.

        Args:
            optimizer: any `torch.optim.Optimizer` (or accelerate's shell of one) over the wrapped model's own parameters.
            decoupled: leave the penalty out of the gradients and, after the step, take it off the weights themselves, as AdamW
                does with weight decay: W ← W − lr · penalty_coef · ∇penalty(W), with the rate of the parameter's group.
                Adam does not rescale it then. Computed in float32; bfloat16 parameters are rounded stochastically, as no
                optimizer of torch keeps a master copy.
            every: compute the penalty at each n-th step only, n times as strong.
            group: the process group over which balance gradients are averaged; None is the default group.

        Raises:
            TypeError: no such optimizer (DeepSpeed's, whose ZeRO steps copies of the parameters).
            ValueError: it holds none of the gates' parameters, or `every` is below 1.
        """
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every=}")
        self._attach(optimizer, decoupled, every, True, group)

    def _attach(self, optimizer: Any, decoupled: bool = False, every: int = 1, alone: bool = False, group: Any = None) -> None:
        self.still_there()
        self._find_replaced()
        stepper = check_optimizer(self.gates, self.model, optimizer)
        if self.at_step is not None:
            self.at_step.detach()
        self.at_step = AtStep(self, stepper, decoupled, every, alone, group)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Detached floats for each gate, by its name, of its weight as it is now and of the last training forward.

        sigma_max and stable_rank of the weight; sigma_drift and rank_drift: by what share they have moved from the anchors of
        the penalty, NaN where it has none; penalty: this gate's part; balance: CV², squared coefficient of variation of
        the experts' mean probability; entropy: of that mean, over log K, in [0, 1]; max_share: its largest
        entry; dead: the number of experts below 1 % of an even share; loss: this gate's part of the term, coefficients
        included, with whatever penalty and balance loss are in use. What needs a training forward is NaN before the first
        one, and for a gate that did not run.

        This reads numbers back from the device, so call it at logging steps; under FSDP2 and ZeRO-3 call it on every rank.
        """
        return measure(self)

    def report(self, batch: Any, *, top_k: int | None = None) -> dict[str, dict[str, Any]]:
        """What a batch tells of each gate, by its name: one forward in evaluation, without gradients and without the term.

        tokens, top_k; load: each expert's share of the choices; probability: its mean probability; coactivation: K x K, the
        share of tokens that get both (the diagonal: that get it); margin: by how much the last chosen logit is above the best
        of the others; radius: the largest change of the gate's input that cannot change the choice, as
        `functional.choice_radius` has it, and relative_radius, over the input's norm; flips: by format (bf16, fp8, int8), the
        share of tokens whose choice changes when inputs and weight are rounded to it, as between training and serving. Margin
        and radii are quantiles over tokens; radii and flips are None where the logits are not W x + b of what comes in. The
        choice is that of the logits: a selection bias, noise and groups are not in it.

        Args:
            batch: what the model takes: a mapping of keywords, a tuple, or one tensor.
            top_k: experts a token; None is what the gate or the model's config says.

        Raises:
            ValueError: nothing says how many experts a token gets, or it is no such number.
            RuntimeError: no gate ran.
        """
        return examine(self.model, self.gates, batch, top_k)

    def remove(self) -> None:
        """Take every hook off; the model is then what it was. Call it after the backward; safe to call twice."""
        for module, registry, hook in list(_hooks_below(self.model)):
            if hook.handle is self:
                for key in [key for key, value in registry.items() if value is hook]:
                    del registry[key]
                    for flags in (
                        "_forward_hooks_with_kwargs",
                        "_forward_hooks_always_called",
                        "_forward_pre_hooks_with_kwargs",
                    ):
                        getattr(module, flags).pop(key, None)
        if self.at_step is not None:
            self.at_step.detach()
        self.observed.clear()
        self.step = Step(self.taps)
        self.attached = False

    def __enter__(self) -> MoEHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What the objective depends on beyond the model: the state of penalty and balance (anchors, iterates, statistics)."""
        return {
            "gates": {gate.name: (gate.num_experts, gate.dim) for gate in self.gates},
            **{name: tensors(part) for name, part in (("penalty", self.penalty), ("balance", self.balance))},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another handle on the same gates.

        Raises:
            ValueError: the state is of other gates, or none of a handle.
        """
        check_state(state)
        here = {bare_text(gate.name): (gate.num_experts, gate.dim) for gate in self.gates}
        there = {bare_text(name): tuple(shape) for name, shape in state["gates"].items()}
        if here != there:
            different = [name for name in here | there if here.get(name) != there.get(name)]
            raise ValueError(f"the state is of other gates than this handle's; they differ in {', '.join(different)}")
        for name, part in (("penalty", self.penalty), ("balance", self.balance)):
            if isinstance(part, nn.Module):
                restore(part, state[name], next(self.model.parameters()).device)

    def __repr__(self) -> str:
        head = ("gate", "class", "experts x dim", "scoring", "read from")
        rows = [head] + [(g.name, type(g.module).__name__, f"{g.num_experts} x {g.dim}", g.scoring, g.how) for g in self.gates]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts = [
            f"{c} x {p!r}" for p, c in ((self.penalty, self.penalty_coef), (self.balance, self.balance_coef)) if p is not None
        ]
        return "\n".join([f"{type(self.model).__name__}: {' + '.join(parts) or 'nothing added'}", *lines])


def _hooks_below(model: nn.Module) -> list[tuple[nn.Module, dict[int, Any], Hook]]:
    registries: list[tuple[nn.Module, dict[int, Any]]] = [
        (module, registry) for module in model.modules() for registry in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return [(module, registry, hook) for module, registry in registries for hook in registry.values() if isinstance(hook, Hook)]
