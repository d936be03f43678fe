"""The hooks on a wrapped model and what they note down during one forward: the hot path of `wrap_moe`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._delivery import call_arguments, loss_of, pass_on, share_of_step, token_mask, with_loss
from .gates import Gate

# Stand-ins of forwards whose backward never came are let go after so many further ones of the same gate.
_OUTSTANDING = 64
# So many forwards in a row whose loss saw no backward are taken as a sign that nobody uses that loss.
_UNUSED = 8


class Call(NamedTuple):
    """One call of a gate in one forward of the model."""

    index: int
    probs: Tensor
    weight: Tensor
    layout: torch.Size  # of the gate's input


class Recorder:
    """Collects what the gates of a model compute in one forward, and makes the term of it.

    One forward of the model, from its pre-hook to its hook, is a record. A gate that is called outside of one, with gradients
    on, is being recomputed by activation checkpointing: it takes the same steps, so that what is saved for
    backward matches, and notes nothing; if its first pass had no graph, it hands on the gradients that have come in for it.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: list[Gate],
        penalty: Callable[[Sequence[Tensor]], Tensor] | None,
        balance: Callable[[Tensor, Tensor | None], Tensor] | None,
        penalty_coef: float,
        balance_coef: float,
        add_to_loss: bool,
    ) -> None:
        self.model = model
        self.gates = gates
        self.penalty = penalty
        self.balance = balance
        self.penalty_coef = penalty_coef
        self.balance_coef = balance_coef
        self.add_to_loss = add_to_loss
        self.attached = True
        self._said: set[str] = set()
        self._shares: dict[int, Tensor] = {}
        self._ties: list[list[int]] = _tied(gates)
        self.forget()

    def forget(self) -> None:
        """Drop everything that belongs to a step."""
        self._open = False
        self._calls: list[Call] = []
        self._deferred: dict[int, list[list[Tensor]]] = {}
        self._arguments: dict[str, Any] = {}
        self._term: Tensor | None = None
        self._state = "none"
        self._without_backward = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold no tensor of a step: graphs cannot be copied."""
        step = dict(_open=False, _calls=[], _deferred={}, _arguments={}, _term=None, _state="none", _without_backward=0)
        return {**self.__dict__, **step}

    # one forward ------------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open = self.attached and model.training and torch.is_grad_enabled()
        if not self._open:
            return
        if not torch.compiler.is_compiling():
            self._check_use()
        self._calls = []
        self._term = None
        self._arguments = call_arguments(model, args, kwargs)

    def at_gate(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (self.attached and module.training):
            return None
        gate = self.gates[index]
        if gate.module is not module:  # an adapter library has put a copy in its place
            gate.module = module
        with_graph = torch.is_grad_enabled()
        if not (self._open or with_graph):
            return None
        with torch.enable_grad():
            weight = gate.weight
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                weight = _whole(weight).clone()  # sharding engines free it after the module's forward
        adapted = hasattr(gate.owner, "parametrizations")
        if not (weight.requires_grad or adapted):
            return None  # frozen
        probs = gate.read(args, kwargs, output)
        if not self._open:
            return self._again(index, probs, weight, output)
        if not with_graph:
            probs, weight = self._stand_in(index, probs, weight)
        tokens = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), probs)
        self._calls.append(Call(index, probs, weight, tokens.shape))
        return None

    def finish(self, output: Any) -> Any:
        if not self._open:
            return None
        calls, arguments = self._calls, self._arguments
        self._open, self._calls, self._arguments = False, [], {}
        if output is None:  # an exception passed by
            return None
        if not torch.compiler.is_compiling():
            self._check_first(calls)
        term = self._total(calls, arguments)
        if term is None:
            return None
        loss = loss_of(output) if self.add_to_loss else None
        if loss is None:
            self._term, self._state = term, "open"
            return None
        total = loss + term.to(loss)
        self._state = "added to the loss that the model returned"
        if not torch.compiler.is_compiling():
            self._without_backward += 1
            total.register_hook(self._seen_backward)
        return with_loss(output, total)

    def _seen_backward(self, _grad: Tensor) -> None:
        self._without_backward = 0

    # checkpointed layers ----------------------------------------------------------------------------------------------

    def _stand_in(self, index: int, probs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Reentrant checkpointing, first pass: no graph. Leaves stand in for what the second pass will compute."""
        probs = probs.detach().requires_grad_()
        stand_ins = [probs]
        if not weight.requires_grad:  # an adapter's weight, made of others, here without a graph
            weight = weight.detach().requires_grad_()
            stand_ins.append(weight)
        self._deferred[index] = [*self._deferred.get(index, [])[1 - _OUTSTANDING :], stand_ins]
        return probs, weight

    def _again(self, index: int, probs: Tensor, weight: Tensor, output: Any) -> Any:
        waiting = self._deferred.get(index)
        if not waiting:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
                self.say(
                    "outside",
                    f"gate {self.gates[index].name!r} ran in training, but outside a call of the wrapped {type(self.model).__name__}, "
                    "so nothing is recorded; wrap the module that your loop calls (a PEFT model, say, instead of its base)",
                )
            return None
        # several forwards may wait for their backward: the last one with the same values
        match = [i for i, (probs_before, *_) in enumerate(waiting) if len(waiting) == 1 or torch.equal(probs_before, probs)]
        stand_ins = waiting.pop(match[-1] if match else -1)
        return pass_on(stand_ins, [probs, weight][: len(stand_ins)], output, self.gates[index].name)

    # the term ---------------------------------------------------------------------------------------------------------

    def _total(self, calls: list[Call], arguments: dict[str, Any]) -> Tensor | None:
        if not calls:
            return None
        device = calls[0].probs.device
        parts: list[Tensor] = []
        with torch.autocast(device.type, enabled=False):
            if self.penalty is not None:
                weights = self._weights({call.index: call.weight for call in reversed(calls)})
                if weights:
                    parts.append(self.penalty_coef * self.penalty(weights))
            for call in calls:
                mask = token_mask(arguments, self.gates[call.index].name, call.probs, call.layout)
                self._shares[call.index] = _share(call.probs.detach(), mask)
                if self.balance is not None:
                    parts.append(self.balance_coef * self.balance(call.probs, mask))
            if not parts:
                return None
            total = torch.stack([part.to(device) for part in parts]).sum()
            return total * share_of_step(self.model, arguments)

    def penalised(self) -> list[list[int]]:
        """Indices of the gates whose weights go to the penalty; tied ones, which share a parameter, together."""
        return [group for group in self._ties if self._trainable(self.gates[group[0]])]

    def _weights(self, seen: dict[int, Tensor]) -> list[Tensor]:
        weights = []
        for group in self.penalised():
            run = [seen[index] for index in group if index in seen]
            # a gate that did not run, as the one of the other modality, has a weight all the same
            weights.append(run[0] if run else self.full_weight(self.gates[group[0]]))
        return weights

    def _trainable(self, gate: Gate) -> bool:
        if gate.adapter is not None:
            return any(parameter.requires_grad for parameter in gate.adapter.parameters())
        return any(parameter.requires_grad for parameter in gate.owner.parameters(recurse=False))

    def full_weight(self, gate: Gate) -> Tensor:
        """The weight of a gate outside of a forward, whole on this rank."""
        weight = gate.weight
        if weight.numel() == 0 and hasattr(getattr(gate.owner, gate.parameter.rpartition(".")[2]), "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(gate.owner.parameters(recurse=False))):
                return gate.weight.clone()
        return _whole(weight)

    # warnings, each once ----------------------------------------------------------------------------------------------

    def say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, stacklevel=2)

    def warn_at_wrapping(self) -> None:
        config = getattr(self.model, "config", None)
        native = [key for key in vars(config or object) if key.endswith("aux_loss_coef") and getattr(config, key)]
        if self.balance is not None and native and getattr(config, "output_router_logits", False):
            self.say(
                "native",
                f"the model's own balance loss is on too (config.output_router_logits, {native[0]}={getattr(config, native[0])}); "
                "set config.output_router_logits=False, or wrap with balance=None",
            )
        compiled = [name or "the model" for name, m in self.model.named_modules() if m._compiled_call_impl is not None]
        compiled += [name for name, module in self.model.named_modules() if hasattr(module, "_orig_mod")]
        if compiled:
            self.say(
                "compiled",
                f"compiled before wrap_moe: {', '.join(compiled[:3])}; what has run already will not see the hooks: wrap first, "
                "or call torch._dynamo.reset()",
            )

    def _check_use(self) -> None:
        if self._term is not None:
            self.say(
                "unused",
                "the term of the last forward was not used: the model's output carries no loss that it could be added to, so add "
                "handle.loss() to yours after each forward",
            )
        if self._without_backward == _UNUSED:
            self.say(
                "no backward",
                f"no backward has reached the loss that the model returned, with the term in it, for {_UNUSED} forwards; if your "
                "loop computes its own loss, wrap with add_to_loss=False and add handle.loss()",
            )

    def _check_first(self, calls: list[Call]) -> None:
        if "first" in self._said:
            return
        self._said.add("first")
        frozen = [gate.name for gate in self.gates if not self._trainable(gate)]
        if frozen:
            self.say("frozen", f"frozen gates are left alone, as nothing of them can learn: {', '.join(frozen)}")
        ran = {call.index for call in calls}
        idle = [gate.name for i, gate in enumerate(self.gates) if i not in ran and gate.name not in frozen]
        if idle:
            self.say(
                "idle",
                f"these gates did not run in the first training forward, or something bypasses them: {', '.join(idle)}; their "
                "weights are penalised, their balance is not",
            )


class Hook:
    """A hook that knows its handle. Classes of their own, not closures, so that models pickle."""

    def __init__(self, handle: Recorder, index: int = -1) -> None:
        self.handle = handle
        self.index = index

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # A copy of the whole model gets a handle of its own. A copy of a part is an adapter library's: it reports to this one.
        if id(self.handle.model) not in memo:
            return self
        return type(self)(copy.deepcopy(self.handle, memo), self.index)


class BeforeModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handle.begin(module, args, kwargs)


class AfterModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle.finish(output)


class AtGate(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle.at_gate(self.index, module, args, kwargs, output)


def _tied(gates: list[Gate]) -> list[list[int]]:
    """Groups of gates with one and the same parameter, by index."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for index, gate in enumerate(gates):
        parameter = getattr(gate.owner, gate.parameter.rpartition(".")[2])
        groups.setdefault((id(parameter), gate.index), []).append(index)
    return list(groups.values())


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _share(probs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean probability of each expert, (K)."""
    if mask is not None:
        probs = torch.where(mask[..., None], probs, 0)
    total = probs.flatten(0, -2).sum(0)
    return total / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
