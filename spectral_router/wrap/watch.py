"""The guard at the optimizer's step: whoever steps the gates without the term is told then, not eight forwards later."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .recorder import Recorder

_watched: weakref.WeakSet[Recorder] = weakref.WeakSet()


def watch(recorder: Recorder) -> None:
    """Look after this recorder at the steps of all optimizers. torch's hook is one for the process and stays."""
    if not hasattr(watch, "registered"):
        watch.registered = register_optimizer_step_pre_hook(_before_step)  # type: ignore[attr-defined]
    _watched.add(recorder)


def unwatch(recorder: Recorder) -> None:
    _watched.discard(recorder)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(callable(value) for value in (*args[1:], *kwargs.values())):  # a closure: the backward is still to come
        return
    for recorder in list(_watched):
        if recorder.attached and recorder.at_step is None and not recorder.advice.said("lost"):
            _look(recorder, optimizer)


def _look(recorder: Recorder, optimizer: torch.optim.Optimizer) -> None:
    """Has the term of the forwards since the last step had a backward?"""
    step = recorder.step
    forwards, arrived = tally(recorder)
    unseen = not (forwards or step.fate or step.evaluated)
    if not (arrived or forwards or unseen) or not _holds_gates(optimizer, recorder, with_gradients=unseen):
        return
    tally(recorder, clear=True)
    if not arrived:
        recorder.advice.lost(type(recorder.model).__name__, forwards, unseen)


def tally(recorder: Recorder, clear: bool = False) -> tuple[int, bool]:
    """Training forwards since the last optimizer step, and whether a backward has reached the term of one."""
    steps = [one.step for one in (recorder, *recorder.threads.values())]  # those of DataParallel's replicas
    found = sum(step.forwards for step in steps), any(step.arrived for step in steps)
    for step in steps if clear else ():
        step.forwards, step.arrived = 0, False
    return found


def _holds_gates(optimizer: torch.optim.Optimizer, recorder: Recorder, with_gradients: bool) -> bool:
    own = {id(parameter) for gate in recorder.gates for parameter in gate.owner.parameters()}
    return any(
        id(parameter) in own and not (with_gradients and parameter.grad is None)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
