"""transformers' Trainer: the term delivered, the router's metrics in its logs, the objective's state in its checkpoints."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..wrap.handle import MoEHandle
from ..wrap.watch import tally
from . import router_metrics

__all__ = ["MoECallback"]


class MoECallback(TrainerCallback, ExportableState):
    """Delivers the term whoever builds the loss, logs what the routers do, and keeps `handle.state_dict()` in checkpoints.

    A trainer that uses the model's own loss, as Trainer does, has the term in it. One that builds the loss itself (TRL's, a
    `compute_loss` of your own) would lose it: that is seen at the first optimizer step, and from then on the term is delivered
    there, as `handle.attach(optimizer)` does, the first step included. Where it cannot be (DeepSpeed), training stops with an
    error that says what to do.

    Each training log (`logging_steps`) gets the keys of `integrations.router_metrics`: they are in `trainer.state.log_history`
    and reach every reporter. The logged `loss` holds the term already. The state (anchors, iterates, statistics) is a
    part of each checkpoint's `trainer_state.json`, and `resume_from_checkpoint` restores it before the first step.

    The Trainer of transformers 5.23 by itself loads neither gates nor experts of most models when it resumes
    (huggingface/transformers#48805): make the model with `from_pretrained(checkpoint)`.

    Args:
        handle: of the wrapped model; None finds that of the Trainer's model.
        per_gate: log every number of every gate too.

    Raises:
        ValueError: when training begins: no handle, and the model is not wrapped; or the checkpoint is of other gates.
        RuntimeError: at an optimizer step that the term does not reach.

    Warns:
        UserWarning: the checkpoint holds no state, so that "initial" anchors are those of the weights as they are now.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[MoECallback(handle)])  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, handle: MoEHandle | None = None, per_gate: bool = False) -> None:
        self.handle = handle
        self.per_gate = per_gate
        self._given = handle
        self._attached = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # looked for each time: each trial of a search has a model of its own
        self.handle = self._given or (None if model is None else MoEHandle.of(model))
        if self.handle is None:
            raise ValueError("the Trainer's model is not wrapped; call wrap_moe(model) first")
        self._go_first()
        if self.handle.at_step is None:
            with suppress(TypeError):  # DeepSpeed's: there the term is in the loss, or training stops below
                self.handle._attach(kwargs["optimizer"], alone=False)
                self._attached = True
        if state.global_step:  # a resumed run
            self._restore(self.handle, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        handle, optimizer = self.handle, kwargs.get("optimizer")
        if handle is None:
            return
        if handle.at_step is not None:
            scaler = getattr(optimizer, "scaler", None)
            if scaler is None or not scaler.is_enabled():  # else the gradients may still be scaled, and the step undoes it
                handle.at_step.early()
            return
        forwards, arrived = tally(handle, clear=True)
        if forwards and not arrived:
            raise RuntimeError(
                f"the routers' term of {forwards} training forward(s) has had no backward: the loss is built elsewhere, "
                f"and the term cannot be delivered at the steps of {type(optimizer).__name__}; add handle.loss() to your loss "
                "after each forward"
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._attached and self.handle is not None and self.handle.at_step is not None:
            self.handle.at_step.detach()  # another loop may have the loss of the model again
        self._attached = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.handle is None or logs is None or "loss" not in logs:  # of an evaluation, or the summary at the end
            return
        report = router_metrics(self.handle, self.per_gate)
        logs |= report
        if state.log_history:  # a copy of `logs` went there before
            state.log_history[-1] |= report

    # Trainer asks for this at each checkpoint. A file of our own would miss some: no event tells the folder that is written
    # or resumed from, and the upload to the hub comes before `on_save`.
    def state(self) -> dict[str, Any]:
        attributes = {} if self.handle is None else {"saved": _to_json(self.handle.state_dict())}
        return {"args": {"per_gate": self.per_gate}, "attributes": attributes}

    def _restore(self, handle: MoEHandle, state: TrainerState) -> None:
        entries: Any = state.stateful_callbacks or {}
        state.stateful_callbacks = entries
        entry = entries.get(type(self).__name__, {})
        saved = (entry[-1] if isinstance(entry, list) else entry).get("attributes", {}).get("saved")
        if saved is None:
            entries.setdefault(type(self).__name__, self.state())  # else Trainer's next save misses the entry
            warnings.warn(
                "the checkpoint holds no state of the routers' objective, as it was written without MoECallback; "
                'sigma_target="initial" takes the weights as they are now for its anchors',
                stacklevel=2,
            )
        else:
            handle.load_state_dict(_from_json(saved))

    def _go_first(self) -> None:
        """Reporters log what is in `logs` when they are called, and Trainer calls its own before the user's callbacks.

        The order is that of a list which no event hands out: it is the caller's.
        """
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler):
                # in place, and not later than here: the caller is on its way through this list and must meet each entry once
                caller.callbacks.remove(self)
                caller.callbacks.insert(0, self)
                return
            frame = frame.f_back


def _to_json(value: Any) -> Any:
    """Tensors as lists: exact, as Python's floats are wide enough and printed in full."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    return {key: _to_json(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "values"}:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
    return {key: _from_json(entry) for key, entry in value.items()}
