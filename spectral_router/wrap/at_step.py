"""Delivery at the optimizer's step: the term's gradient goes to the gates' gradients right before they are used.

For loops in which somebody else builds the loss, or scales it: by then accumulation, loss scaling, checkpointing and sums over
ranks are over. The penalty depends on weights alone and is computed once a step. The balance loss reads activations: its
gradient with respect to a gate's own matrix and bias is taken at the gate, from detached input, in each recorded forward
(`note`), and averaged over the forwards, and the ranks, of the step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_tensor
from torch.utils import _pytree as pytree

from .._precision import autocasting, full_precision
from .._sharding import whole
from ..gates.gate import first_tokens
from .delivery import layout_of, own_mask, token_mask
from .optimizer import subtract_
from .step import Call, Pull, Tap
from .step_penalty import add_penalty_, penalty_gradients
from .watch import tally
from .weights import add_to_gradients, sources, trainable

if TYPE_CHECKING:
    from .recorder import Recorder


class AtStep:
    """The tie between the gates of a wrapped model and the optimizer that steps them."""

    def __init__(
        self, recorder: Recorder, optimizer: torch.optim.Optimizer, decoupled: bool, every: int, alone: bool, group: Any
    ) -> None:
        self.recorder = recorder
        self.optimizer = optimizer
        self.decoupled = decoupled
        self.every = every
        self.alone = alone  # False: only where the term turns out not to arrive by the loss
        self.group = group
        self.steps = 0
        self._early = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        for tap in recorder.taps:
            tap.pull = _empty(tap)

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for tap in self.recorder.taps:
            tap.pull = None
        self.recorder.at_step = None

    # in a forward -----------------------------------------------------------------------------------------------------

    def note(
        self,
        tap: Tap,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        record: bool = True,
    ) -> None:
        """Add the balance gradient of one call of a gate to what its matrix and bias get at the step."""
        if tap.pull is None:
            raise RuntimeError(
                "delivery at the optimizer's step does not work under torch.nn.DataParallel, whose replicas share one gate; "
                "use DistributedDataParallel, or wrap without optimizer="
            )
        recorder, gate = self.recorder, tap.gate
        tap.seen = True
        layout = layout_of(args, kwargs, tap.pull.weight)
        mask = own_mask(tap.padding, args, kwargs)
        rough = autocasting(tap.pull.weight.device)
        # what is saved for backward here is none of the business of checkpoints and offloading
        with _plain_saving(), full_precision(tap.pull.weight.device):
            if not trainable(gate):
                if record:
                    tap.calls.append(Call(None, tap.pull.weight, layout))
                return
            with torch.no_grad():
                linear = gate.probs is None and gate.reads != "probs"
                scores = gate.read(args, kwargs, output, logits=linear)
                tokens = None
                if linear:
                    tokens = whole(first_tokens(args, kwargs, gate.dim))
                    tokens = (tokens if gate.index is None else tokens[gate.index]).reshape(-1, gate.dim)
                    linear = self._scored_plainly(tap, tokens, scores, output, rough)
            if not linear or tokens is None:
                recorder.advice.not_at_step(gate.name)
                probs = scores if gate.probs is not None or gate.reads == "probs" else gate.score(scores)
            else:
                self._pull(tap, scores, tokens, layout, mask)
                probs = scores if recorder.reads_logits else gate.score(scores)
            if record:
                tap.calls.append(Call(probs, tap.pull.weight, layout, mask=mask))

    def _scored_plainly(self, tap: Tap, tokens: Tensor, scores: Tensor, output: Any, rough: bool) -> bool:
        """Whether the gate's logits are W x + b, seen once a gate, in its first eager call."""
        if tap.plain is None and not torch.compiler.is_compiling():
            tensors = [leaf for leaf in (tokens, *pytree.tree_leaves(output)) if is_tensor(leaf)]
            half = rough or any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
            again = tap.gate.logits(tokens)
            error = (again - scores.reshape_as(again)).abs().amax() / again.abs().amax().clamp_min(1e-30)
            if error.isfinite():  # a run that has diverged tells nothing
                tap.plain = bool(error < (5e-2 if half else 1e-3))
        return tap.plain is not False

    def _pull(self, tap: Tap, logits: Tensor, tokens: Tensor, layout: torch.Size, own: Tensor | None) -> None:
        recorder, pull = self.recorder, tap.pull
        balance = recorder.balance
        if balance is None or pull is None:
            return
        mask = token_mask(recorder.step.arguments, tap.decoding, logits, layout, own)

        def value(leaf: Tensor) -> Tensor:
            return balance(leaf if recorder.reads_logits else tap.gate.score(leaf), mask)

        if torch.compiler.is_compiling():
            slope = torch.func.grad(value)(logits)
        else:
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                slope = torch.autograd.grad(value(leaf), leaf)[0]
        with torch.no_grad():
            slope = slope.reshape(-1, slope.shape[-1]).to(pull.weight.dtype)
            pull.weight.add_(slope.mT @ tokens.to(slope.dtype))
            if pull.bias is not None:
                pull.bias.add_(slope.sum(0))
            pull.count.add_(1)

    # at the step ------------------------------------------------------------------------------------------------------

    def early(self) -> None:
        """Deliver now what the coming step would: for callbacks that run right before it."""
        if not self._early:
            self.deliver()
            self._early = True

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure") or next((arg for arg in args[1:] if callable(arg)), None)
        if closure is None:
            if not self._early:
                self.deliver()
            self._early = False
            return None

        def with_term() -> Any:  # the closure makes the gradients
            loss = closure()
            self.deliver()
            return loss

        return tuple(with_term if arg is closure else arg for arg in args), {
            name: with_term if value is closure else value for name, value in kwargs.items()
        }

    def deliver(self) -> None:
        recorder = self.recorder
        step, taps = recorder.step, recorder.taps
        if not self.alone:
            forwards, arrived = tally(recorder, clear=True)
            if arrived or not forwards:
                for tap in taps:
                    if tap.pull is not None:
                        tap.pull.clear()
                if arrived:
                    self.detach()
                return
            self.alone, step.term, step.without_backward = True, None, 0
            step.fate = "goes to the gates' gradients at the optimizer's step"
        self.steps += 1
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer takes the loss scale off itself
        owned = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        weights, biases = self._balance_gradients()
        if (
            not self.decoupled
            and self.steps % self.every == 0
            and (scale is not None or not add_penalty_(recorder, owned, self.every))
        ):
            for number, slope in penalty_gradients(recorder, self.every).items():
                weights[number] = weights[number] + slope if number in weights else slope
        for number, slope in weights.items():
            bias = biases.get(number)
            if scale is not None:
                slope, bias = slope * scale, None if bias is None else bias * scale
            add_to_gradients(recorder.gates[number], slope, bias, owned)

    def _balance_gradients(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        recorder = self.recorder
        pulls = {number: tap.pull for number, tap in enumerate(recorder.taps) if tap.pull is not None}
        if recorder.balance is None or not pulls:
            return {}, {}
        tensors = [t for pull in pulls.values() for t in (pull.weight, pull.bias, pull.count) if t is not None]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat([tensor.flatten() for tensor in tensors])  # one small all-reduce a step
            torch.distributed.all_reduce(flat, group=self.group)
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
        weights, biases = {}, {}
        for number, pull in pulls.items():
            share = recorder.balance_coef / pull.count.clamp_min(1)
            weights[number] = pull.weight * share
            if pull.bias is not None:
                biases[number] = pull.bias * share
            pull.clear()
            if not trainable(recorder.gates[number]):
                del weights[number]
        return weights, biases

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.decoupled and self.alone and self.steps % self.every == 0):
            return
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer has skipped this step, on the device
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for number, slope in penalty_gradients(self.recorder, self.every).items():
            for parameter, part in sources(self.recorder.gates[number], slope, None):
                if id(parameter) in rates:
                    rate = rates[id(parameter)]
                    subtract_(parameter, part * rate if found is None else part * rate * (1 - found), self.steps)


def _empty(tap: Tap) -> Pull:
    gate = tap.gate
    dtype = torch.float64 if gate.matrix.dtype == torch.float64 else torch.float32
    device = gate.matrix.device
    bias = getattr(gate.owner, "bias", None)
    has_bias = isinstance(bias, Tensor) and bias.shape == (gate.num_experts,) and bias.requires_grad
    return Pull(
        torch.zeros(gate.num_experts, gate.dim, dtype=dtype, device=device),
        torch.zeros(gate.num_experts, dtype=dtype, device=device) if has_bias else None,
        torch.zeros((), dtype=dtype, device=device),
    )


def _plain_saving() -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
