"""transformers' Trainer: the router's metrics in its logs, the state of the objective in its checkpoints."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..wrap.handle import MoEHandle
from . import router_metrics

__all__ = ["MoECallback"]


class MoECallback(TrainerCallback, ExportableState):
    """Logs what the routers of a wrapped model do, and carries `handle.state_dict()` through Trainer's checkpoints.

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

    Warns:
        UserWarning: the checkpoint holds no state, so that "initial" anchors are those of the weights as they are now.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[MoECallback(handle)])  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, handle: MoEHandle | None = None, per_gate: bool = False) -> None:
        self.handle = handle
        self.per_gate = per_gate
        self._given = handle

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
        if state.global_step:  # a resumed run
            self._restore(self.handle, state)

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
