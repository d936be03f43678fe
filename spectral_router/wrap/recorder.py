"""The hooks on a wrapped model and what they note down during one forward: the hot path of `wrap_moe`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from .._sharding import whole
from ..gates.gate import Gate
from .advice import Advice
from .arrival import followed, number_of
from .at_step import AtStep
from .checkpointing import run_again, stand_in
from .delivery import (
    argument_names,
    by_name,
    first_tensor,
    layout_of,
    loss_of,
    own_mask,
    padding_position,
    share_of_step,
    with_loss,
)
from .objective import Objective
from .observed import Observed
from .step import Call, Step, Tap
from .watch import unwatch, watch
from .weights import trainable


class Recorder(Objective):
    """Collects what the gates of a model compute in one forward, and makes the term of it.

    One forward of the model, from its pre-hook to its hook, is a record. A gate that is called outside of one, with gradients
    on, is being recomputed by activation checkpointing: it takes the same steps, so that what is saved for
    backward matches, and notes nothing; if its first pass had no graph, it hands on the gradients that have come in for it.
    """

    def __init__(
        self,
        parts: list[nn.Module],
        gates: list[Gate],
        penalty: Callable[[Sequence[Tensor]], Tensor] | None,
        balance: Callable[[Tensor, Tensor | None], Tensor] | None,
        penalty_coef: float,
        balance_coef: float,
        add_to_loss: bool,
    ) -> None:
        super().__init__(gates, penalty, balance, penalty_coef, balance_coef)
        self.parts = parts
        self.model = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
        self.add_to_loss = add_to_loss
        self.attached = True
        self.advice = Advice()
        self.names = [argument_names(part) for part in parts]
        places = [{id(module) for module in part.modules()} for part in parts]
        within = [next((i for i, place in enumerate(places) if id(gate.module) in place), 0) for gate in gates]
        self.taps = []
        for gate, part in zip(gates, within, strict=True):
            decoding = "decoder_input_ids" in self.names[part] and "decoder" in gate.name.split(".")
            self.taps.append(Tap(gate, decoding, part, padding_position(gate.module)))
        self.step = Step(self.taps)
        self.observed, self.by_names = Observed(), False  # all gates were asked for, and found by names
        self.at_step: AtStep | None = None  # where the term goes to the optimizer's step
        self.threads: dict[int, Recorder] = {}
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        # an optimizer, its hooks and other threads are of this process and of this model
        return {**self.__dict__, "step": None, "at_step": None, "threads": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.step = Step(self.taps)
        self._start()

    def _start(self) -> None:
        self.number = number_of(self)  # in compiled code
        watch(self)

    def of_this_thread(self) -> Recorder:
        """For a replica of DataParallel: a recorder with a step of its own, as replicas run at the same time."""
        mine = self.threads.get(get_ident())
        if mine is None:
            mine = self.threads[get_ident()] = copy.copy(self)
            mine.taps = [Tap(copy.copy(tap.gate), tap.decoding, tap.part, tap.padding) for tap in self.taps]
            mine.gates = [tap.gate for tap in mine.taps]
            mine.step = Step(mine.taps)
            mine.observed = Observed()
            mine.observed.done = set(range(len(self.parts)))  # others are on their way through the hooks that replicas share
            unwatch(mine)
        return mine

    def _find_replaced(self) -> None: ...

    # one forward ------------------------------------------------------------------------------------------------------

    def begin(self, part: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, root = self.step, self.parts[part]
        step.root = root
        step.open = self.attached and root.training and torch.is_grad_enabled()
        if step.open and not torch.compiler.is_compiling():
            if self.advice.once("places"):
                self._find_replaced()
            self.observed.move(self)
        step.evaluated = not step.open
        if not step.open:
            step.fate = step.fate if step.term is not None else ""
            return
        if not torch.compiler.is_compiling() and self.at_step is None:
            self.advice.before_forward(step.term is not None and step.term.requires_grad, step.without_backward)
        step.term, step.fate, step.shared = None, "", False
        for tap in self.taps:
            tap.calls, tap.inputs = [], []
        step.arguments = by_name(self.names[part], args, kwargs)
        self.part = part if len(self.parts) > 1 else None
        self.observed.begin(self, part, args, kwargs)

    def at_gate(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with_graph = torch.is_grad_enabled()
        if not (self.attached and module.training and (self.step.open or with_graph)):
            return None
        given = first_tensor(args, kwargs)
        again: bool | None = False
        if self.step.open and given is not None and not torch.compiler.is_compiling():
            again = tap.again(given, with_graph or self.at_step is not None)
            if again:
                return None
            if again is None:
                tap.calls, tap.deferred = tap.calls[:-1], tap.deferred[:-1]
        if self.at_step is not None and self.at_step.alone:
            with nullcontext() if self.observed.trace is None else self.observed.aside():
                return self.at_step.note(tap, args, kwargs, output) if self.step.open else None
        if self.observed.trace is not None:
            return self.observed.at_gate(self, tap, module, args, kwargs, output)
        return self._note(tap, module, args, kwargs, output, with_graph)

    def _note(
        self, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, with_graph: bool
    ) -> Any:
        gate = tap.gate
        if not torch.compiler.is_compiling() and self.step.open and gate.module is not module and gate.holder is None:
            gate.module = module  # an adapter library has put a copy in its place
        with torch.enable_grad():
            weight = gate.weight
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                weight = whole(weight).clone()  # sharding engines free it after the module's forward
        layout = layout_of(args, kwargs, weight)
        # an adapter that is switched off leaves W frozen; one that was put on after wrapping is not known here
        if not (gate.buffered or (trainable(gate) and (weight.requires_grad or hasattr(gate.owner, "parametrizations")))):
            if self.step.open:
                tap.calls.append(Call(None, weight, layout))
            return None
        if self.at_step is not None and self.step.open:  # it is not known yet where the term will go
            self.at_step.note(tap, args, kwargs, output, record=False)
        scores = gate.read(args, kwargs, output, logits=self.reads_logits)
        if not self.step.open:
            return run_again(tap, scores, weight, output, self.model, self.advice)
        tap.seen = True
        if not with_graph:
            scores, weight = stand_in(tap, scores, weight)
        tap.calls.append(Call(scores, weight, layout, with_graph, own_mask(tap.padding, args, kwargs)))
        return None

    def finish(self, output: Any) -> Any:
        step = self.step
        if self.observed.trace is not None:
            self.observed.finish(self, output)
        if not step.open:
            if (
                step.evaluated
                and self.attached
                and step.root is not None
                and not step.root.training
                and torch.is_grad_enabled()
            ):
                self._look_at_evaluation(output)
            return None
        calls = [(number, call) for number, tap in enumerate(self.taps) for call in tap.calls]
        arguments = step.arguments
        step.open, step.arguments = False, {}
        for tap in self.taps:
            tap.calls, tap.inputs = [], []
        if output is None:  # an exception passed by
            self.part = None
            return None
        try:
            return self._deliver(output, calls, arguments)
        finally:
            self.part = None

    def _deliver(self, output: Any, calls: list[tuple[int, Call]], arguments: dict[str, Any]) -> Any:
        step = self.step
        if not torch.compiler.is_compiling():
            self._look_round(calls, arguments)
        if self.at_step is not None and self.at_step.alone:
            self.measured(calls, arguments)
            step.fate = "goes to the gates' gradients at the optimizer's step"
            return None
        loss = loss_of(output) if self.add_to_loss else None
        term = self._term(calls, arguments)
        if term is None and loss is None and not (self.penalty is None and self.balance is None):
            # every gate is frozen: a loop that adds the term goes on
            term = torch.zeros((), device=calls[0][1].weight.device if calls else self.device)
        if term is None:
            step.fate = "has nothing in it: no gate ran that learns"
            return None
        term = followed(term, self)
        if loss is None:
            step.term, step.fate = term, "is open"
            return None
        step.fate = "is in the loss that the model returned"
        if not torch.compiler.is_compiling():
            step.without_backward += 1
        return with_loss(output, loss + term.to(loss))

    def _term(self, calls: list[tuple[int, Call]], arguments: dict[str, Any]) -> Tensor | None:
        total = self.total(calls, arguments)
        if total is None:
            return None
        share = share_of_step(self.step.root or self.model, arguments)
        self.step.shared = isinstance(share, Tensor)
        return total * (share.to(total.device) if isinstance(share, Tensor) else share)

    def still_there(self) -> None:
        if not self.attached:
            raise RuntimeError("this handle was removed from its model; call wrap_moe(model) for another one")

    def _look_round(self, calls: list[tuple[int, Call]], arguments: dict[str, Any]) -> None:
        if self.advice.once(f"first forward of {self.part}"):
            if arguments.get("output_router_logits"):
                self.advice.own_loss(self.model, self.balance)
            gates, ran = enumerate(self.gates), {number for number, _ in calls}
            self.advice.after_first_forward([(g, i in ran) for i, g in gates if self.runs(i)])

    def _look_at_evaluation(self, output: Any) -> None:
        loss = None if torch.compiler.is_compiling() else loss_of(output)
        if loss is not None and not self.advice.said("evaluation"):
            name = type(self.model).__name__
            loss.register_hook(lambda _grad, advice=self.advice: advice.evaluation(name))
