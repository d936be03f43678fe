"""The first training forward of a wrapped model, watched: its gates' readings are judged by what it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..gates.discover import missed
from ..gates.judge import judge, line_for, watched
from ..gates.trace import Trace
from .checkpointing import stand_in
from .delivery import padding_position
from .step import Call, Tap
from .weights import learns_from, tied

if TYPE_CHECKING:
    from .recorder import Recorder


class Observed:
    """What is watched in the first training forward of each part; afterwards `trace` is None and nothing is looked at.

    A copy or a file of a model has none of it.
    """

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.done: set[int] = set()  # parts
        self.moves: list[tuple[Tap, Tap]] = []  # gates that are hooked at another module from the next forward on
        self.errors: dict[Tap, Exception] = {}
        self.rest: Trace | None = None  # its hooks on the model that an exception was passing by
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace": None, "rest": None, "errors": {}, "call": ((), {})}

    def clear(self) -> None:
        if self.rest is not None:
            self.rest.remove_hooks()
            self.rest = None

    def begin(self, recorder: Recorder, part: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clear()
        if part in self.done or torch.compiler.is_compiling():
            return
        self.done.add(part)
        root = recorder.parts[part]
        gates = [tap.gate for tap in recorder.taps if tap.part == part and not tap.gone]
        if not gates or not _watchable(root):
            return
        self.trace = Trace(root, watched(gates), others=recorder.by_names)
        self.call = args, kwargs
        self.trace.start(args, kwargs)

    def at_gate(self, recorder: Recorder, tap: Tap, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """As after the first forward, but what this computes is not the model's, and a failure may yet be put right."""
        try:
            with self.aside():
                return recorder._note(tap, module, args, kwargs, output, torch.is_grad_enabled())
        except Exception as problem:
            self.errors.setdefault(tap, problem)
            return None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed here is ours, not the model's."""
        trace = self.trace
        assert trace is not None
        before, trace.paused = trace.paused, True
        try:
            yield
        finally:
            trace.paused = before

    def finish(self, recorder: Recorder, output: Any) -> None:
        trace, errors = self.trace, self.errors
        assert trace is not None
        trace.stop(*self.call, output)
        self.trace, self.errors, self.call = None, {}, ((), {})
        if output is None:  # an exception passed by
            self.rest = trace
            return
        if trace.failed is not None:
            recorder.advice.say(
                "unwatched",
                f"the first training forward could not be watched ({type(trace.failed).__name__}: {trace.failed}), so "
                "gates are read as print(handle) says, unconfirmed; see that it is right, or give Gate objects with "
                "probs=function",
            )
        doubtful: dict[str, list[str]] = defaultdict(list)
        inside = {id(module) for module in trace.model.modules()}
        for number, tap in enumerate(recorder.taps):
            if id(tap.gate.owner) not in inside:
                continue
            error = errors.get(tap)
            read = (
                None
                if error is not None
                else [self._probs(recorder, tap, call.scores) for call in tap.calls if call.scores is not None]
            )
            if not tap.gate.module.training or (tap.calls and read == []):  # in evaluation, or frozen
                continue
            verdict = judge(trace, tap.gate, read)
            if verdict.gate is not None:
                self._take(recorder, number, verdict.gate, verdict.scores or [])
            elif verdict.message:
                doubtful[verdict.message].append(tap.gate.name)
            elif error is not None:
                raise error
        sure = trace.ordered and not trace.sharded and trace.failed is None
        if sure and (names := missed(trace, trace.model, recorder.gates)):
            recorder.advice.say(
                "missed",
                f"the first training forward shows more gates than were found: {', '.join(names)}; nothing is added for them: "
                "pass wrap_moe(example=batch), which finds them by what the model computes, or name them with gates=",
            )
        for message, names in doubtful.items():
            gate = next(gate for gate in recorder.gates if gate.name == names[0])
            recorder.advice.say(
                f"misread {names}", f"gate{'s' if len(names) > 1 else ''} {', '.join(names)}: {message}; write {line_for(gate)}"
            )

    @staticmethod
    def _probs(recorder: Recorder, tap: Tap, scores: Tensor) -> Tensor:
        return tap.gate.score(scores.detach()) if recorder.reads_logits else scores.detach()

    def _take(self, recorder: Recorder, number: int, gate: Any, scores: list[Tensor]) -> None:
        old = recorder.taps[number]
        new = Tap(gate, old.decoding, old.part, padding_position(gate.module), seen=True, pull=old.pull)
        for logits in scores:
            with torch.enable_grad():
                weight = gate.weight
            given = logits if recorder.reads_logits else gate.score(logits)
            live = logits.requires_grad or not (weight.requires_grad or gate.buffered)
            if not live:  # the first pass of reentrant checkpointing
                given, weight = stand_in(new, given, weight)
            new.calls.append(Call(given if learns_from(gate) else None, weight, logits.shape, live))
        recorder.taps[number] = new
        recorder.gates[recorder.gates.index(old.gate)] = gate
        recorder.ties = tied(recorder.gates)
        self.moves.append((old, new))
        if new.deferred:  # the second pass, in this step's backward, is to find the stand-ins
            self.move(recorder)
        # else the old hook stays until the next forward, so that a recomputation saves what this forward did

    def move(self, recorder: Any) -> None:
        """Hook the gates that were corrected where their scores are."""
        for old, new in self.moves:
            for key, hook in list(old.gate.module._forward_hooks.items()):
                if getattr(hook, "tap", None) is old:
                    del old.gate.module._forward_hooks[key]
                    old.gate.module._forward_hooks_with_kwargs.pop(key, None)
            recorder.registrations.append(recorder._hook(new))
        self.moves = []


def _watchable(model: nn.Module) -> bool:
    """Not where torch keeps dispatch for itself or there are no values: transforms, other modes, code compiled already,
    replicas in threads, the meta device."""
    if torch._C._functorch.peek_interpreter_stack() is not None or getattr(model, "_is_replica", False):
        return False
    if torch._C._len_torch_dispatch_stack() or any(parameter.is_meta for parameter in model.parameters()):
        return False
    return not any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())
