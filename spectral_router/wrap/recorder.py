"""The hooks on a wrapped model and what they note down during one forward: the hot path of `wrap_moe`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._precision import full_precision
from .._sharding import whole
from ..balance.formulas import expert_sums
from ..gates.gate import Gate
from ..gates.select import refuse_without_logits
from .advice import Advice
from .delivery import argument_names, by_name, loss_of, pass_on, share_of_step, token_mask, with_loss
from .step import Call, Step
from .weights import full_weight, tied, trainable

# Stand-ins of forwards whose backward never came are let go after so many further ones of the same gate.
_OUTSTANDING = 64


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
        self.advice = Advice()
        self.step = Step()
        self.shares: dict[int, Tensor] = {}  # of the last training forward, by gate: mean probability of each expert
        self.balances: dict[int, Tensor] = {}  # likewise: the balance loss, without coefficient
        self.ties = tied(gates)  # numbers of the gates that share a matrix, for each matrix
        self._names = argument_names(model)
        self._two_sided = "decoder_input_ids" in self._names

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "step": Step()}

    @property
    def balance(self) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        return self._balance

    @balance.setter
    def balance(self, balance: Callable[[Tensor, Tensor | None], Tensor] | None) -> None:
        if (reads := getattr(balance, "reads", "probs")) not in ("probs", "logits"):
            raise ValueError(f'the attribute reads of a balance loss must be "probs" or "logits", got {reads=}')
        if reads == "logits":
            refuse_without_logits(self.gates)
        self._balance = balance

    @property
    def reads_logits(self) -> bool:
        """Whether the balance loss, as it is now, is called with logits."""
        return getattr(self._balance, "reads", "probs") == "logits"

    # one forward ------------------------------------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self.step
        step.open = self.attached and self.model.training and torch.is_grad_enabled()
        if not step.open:
            step.fate = step.fate if step.term is not None else ""
            return
        if not torch.compiler.is_compiling():
            self.advice.before_forward(step.term is not None and step.term.requires_grad, step.without_backward)
        step.calls, step.term, step.fate = [], None, ""
        step.arguments = by_name(self._names, args, kwargs)

    def at_gate(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with_graph = torch.is_grad_enabled()
        if not (self.attached and module.training and (self.step.open or with_graph)):
            return None
        gate = self.gates[index]
        if self.step.open and gate.module is not module:  # an adapter library has put a copy in its place
            gate.module = module
        with torch.enable_grad():
            weight = gate.weight
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                weight = whole(weight).clone()  # sharding engines free it after the module's forward
        tokens = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), weight)
        # an adapter that is switched off leaves W frozen; one that was put on after wrapping is not known here
        if not (trainable(gate) and (weight.requires_grad or hasattr(gate.owner, "parametrizations"))):
            if self.step.open:
                self.step.calls.append(Call(index, None, weight, tokens.shape))
            return None
        scores = gate.read(args, kwargs, output, logits=self.reads_logits)
        if not self.step.open:
            return self._again(index, scores, weight, output)
        if not with_graph:
            scores, weight = self._stand_in(index, scores, weight)
        self.step.calls.append(Call(index, scores, weight, tokens.shape, with_graph))
        return None

    def finish(self, output: Any) -> Any:
        step = self.step
        if not step.open:
            return None
        calls, arguments = step.calls, step.arguments
        step.open, step.calls, step.arguments = False, [], {}
        if output is None:  # an exception passed by
            return None
        if not torch.compiler.is_compiling():
            self._look_round(calls, arguments)
        loss = loss_of(output) if self.add_to_loss else None
        term = self._total(calls, arguments)
        if term is None and loss is None and calls and not (self.penalty is None and self.balance is None):
            term = calls[0].weight.new_zeros(())  # every gate is frozen: a loop that adds the term goes on
        if term is None:
            step.fate = "has nothing in it: no gate ran that learns"
            return None
        if loss is None:
            step.term, step.fate = term, "is open"
            return None
        total = loss + term.to(loss)
        step.fate = "is in the loss that the model returned"
        if not torch.compiler.is_compiling():
            step.without_backward += 1
            total.register_hook(self._seen_backward)
        return with_loss(output, total)

    def _seen_backward(self, _grad: Tensor) -> None:
        self.step.without_backward = 0

    def _look_round(self, calls: list[Call], arguments: dict[str, Any]) -> None:
        if self.advice.once("first forward"):
            if arguments.get("output_router_logits"):
                self.advice.own_loss(self.model, self.balance)
            ran = {call.gate for call in calls}
            frozen = [gate.name for gate in self.gates if not trainable(gate)]
            idle = [gate.name for i, gate in enumerate(self.gates) if i not in ran and gate.name not in frozen]
            self.advice.after_first_forward(frozen, idle)

    # checkpointed layers ----------------------------------------------------------------------------------------------

    def _stand_in(self, index: int, scores: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Reentrant checkpointing, first pass: no graph. Leaves stand in for what the second pass will compute."""
        # for the weight too: DDP takes one gradient a parameter and backward, which is the second pass's
        scores, weight = scores.detach().requires_grad_(), weight.detach().requires_grad_()
        stand_ins = [scores, weight]
        waiting = self.step.deferred.get(index, [])
        self.step.deferred[index] = [*waiting[1 - _OUTSTANDING :], stand_ins]
        return scores, weight

    def _again(self, index: int, scores: Tensor, weight: Tensor, output: Any) -> Any:
        waiting = self.step.deferred.get(index)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:  # no backward is running
            if not waiting:
                self.advice.outside(self.gates[index].name, type(self.model).__name__)
            return None
        if not waiting:
            return None
        # several forwards may wait for their backward: this one's stand-ins have the same values and, by now, gradients
        here = [i for i, (before, *_) in enumerate(waiting) if len(waiting) == 1 or torch.equal(before, scores)]
        reached = [i for i in here if waiting[i][0].grad is not None]
        stand_ins = waiting.pop((reached or here or [-1])[-1])
        return pass_on(stand_ins, [scores, weight], output, self.gates[index].name)

    # the term ---------------------------------------------------------------------------------------------------------

    def _total(self, calls: list[Call], arguments: dict[str, Any]) -> Tensor | None:
        if not calls:
            return None
        device = calls[0].weight.device
        parts: list[Tensor] = []
        with full_precision(device):
            # of several calls the first one with a graph
            penalty = self._penalty({c.gate: c.weight for c in (*reversed(calls), *(c for c in reversed(calls) if c.live))})
            if penalty is not None:
                parts.append(self.penalty_coef * penalty)
            self.balances = {}
            for call in calls:
                if call.scores is None:
                    continue
                gate = self.gates[call.gate]
                mask = token_mask(arguments, gate.name, call.scores, call.layout, self._two_sided)
                scores = call.scores.detach()
                self.shares[call.gate] = _share(gate.score(scores) if self.reads_logits else scores, mask)
                if self.balance is not None:
                    balance = self.balance(call.scores, mask)
                    self.balances[call.gate] = self.balances.get(call.gate, 0) + balance.detach()
                    parts.append(self.balance_coef * balance)
            if not parts:
                return None
            total = torch.stack([part.to(device) for part in parts]).sum()
            share = share_of_step(self.model, arguments)
            return total * (share.to(device) if isinstance(share, Tensor) else share)

    def learning(self) -> list[bool]:
        """For each matrix, tied ones being one, whether it learns."""
        return [trainable(self.gates[group[0]]) for group in self.ties]

    def _penalty(self, seen: dict[int, Tensor]) -> Tensor | None:
        learning = self.learning()
        if self.penalty is None or not any(learning):
            return None
        each = getattr(self.penalty, "each", None)
        weights = []
        for group, learns in zip(self.ties, learning, strict=True):
            run = [seen[index] for index in group if index in seen]
            if learns or each is not None:
                # a gate that did not run, as the one of the other modality, has a weight all the same
                weights.append(run[0] if run else full_weight(self.gates[group[0]]))
        if all(learning) or each is None:
            return self.penalty(weights)
        # a penalty that remembers its matrices by position gets them all; the frozen ones' parts are left out
        return torch.stack([part for part, learns in zip(each(weights), learning, strict=True) if learns]).sum()


def _share(probs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean probability of each expert, (K)."""
    total = expert_sums(probs, mask)
    return total / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
