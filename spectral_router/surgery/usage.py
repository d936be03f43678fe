"""What a data sample asks of the experts of each gate: counted over one or several forwards, with nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._sharding import whole
from ..gates.gate import Gate
from ..wrap.delivery import argument_names, by_name, layout_of, token_mask
from .choice import Choice, choice_by_score, choice_in, stated_top_k
from .experts import expert_modules, experts_of
from .layout import seen_top_k


@dataclass(frozen=True)
class Usage:
    """Of one gate over a sample: K experts, float64 on the CPU.

    Args:
        tokens: how many tokens passed it.
        share: (K), the part of the choices that fell on each expert, in [0, 1], sum 1. Where all experts take part in every
            token, the part of the tokens in which it has the largest weight.
        weight: (K), its part of the combine weights, in [0, 1], sum 1.
    """

    tokens: int
    share: Tensor
    weight: Tensor


class Tally:
    """What one gate has chosen so far."""

    def __init__(self, gate: Gate, decoding: bool) -> None:
        self.gate, self.decoding = gate, decoding
        block = gate.block if gate.block is not None else gate.module
        self.router = next(
            (child for child in block.children() if any(module is gate.module for module in child.modules())), gate.module
        )
        self.experts = [] if block is gate.module else expert_modules(gate, block)
        self.block = block
        self.top_k: int | None = None
        self.asked = False
        self.arguments: Mapping[str, Any] = {}
        self.scores: Tensor | None = None
        self.layout = torch.Size()
        self.found: Choice | None = None
        self.last: Choice | None = None  # of the last call that was counted
        self.count = self.weight = torch.zeros(0)
        self.tokens = 0

    def at_gate(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.flush()
        scores = whole(self.gate.read(args, kwargs, output)).detach()
        self.scores = scores.reshape(-1, scores.shape[-1])
        self.layout = layout_of(args, kwargs, scores)
        if self.experts:  # else the module is the whole block
            self.look(output)

    def at_router(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.look(output)

    def before_experts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.look([*args, *kwargs.values()])

    def look(self, values: Any) -> None:
        if self.found is None and self.scores is not None and self.gate.scoring != "product_keys":
            self.found = choice_in(values, *self.scores.shape)

    def flush(self) -> None:
        """Count what the last call chose."""
        if self.scores is None:
            return
        scores, self.scores = self.scores, None
        found, self.found = self.found, None
        choice = choice_by_score(self.gate, scores, self._k()) if found is None else found
        self.last = choice
        chosen, weights = choice.chosen, choice.weights
        if found is not None and (weights == chosen).all() and not choice.soft:
            weights = scores * chosen  # only told who, not how much
        if choice.soft:
            chosen = torch.zeros_like(chosen).scatter(-1, weights.argmax(-1, keepdim=True), value=True)
        keep = token_mask(self.arguments, self.decoding, scores, self.layout)
        if keep is not None:
            chosen, weights = chosen[keep], weights[keep]
        count, weight = chosen.double().sum(0).cpu(), weights.double().sum(0).cpu()
        self.count = count if self.tokens == 0 else self.count + count
        self.weight = weight if self.tokens == 0 else self.weight + weight
        self.tokens += len(chosen)

    def _k(self) -> int | None:
        """How many experts a token takes, where the gate does not hand them out."""
        if not self.asked:
            self.asked = True
            self.top_k = stated_top_k([self.gate.module, self.router, self.block, *self.experts])
            if self.top_k is None:
                self.top_k = seen_top_k(self.gate, self.block, experts_of(self.gate))
        return self.top_k

    def usage(self) -> Usage:
        if not self.tokens:  # as the gate of the other modality
            nothing = torch.zeros(self.gate.num_experts, dtype=torch.double)
            return Usage(0, nothing, nothing)
        return Usage(self.tokens, _parts(self.count), _parts(self.weight))


def _parts(values: Tensor) -> Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def usage_of(model: nn.Module, gates: Sequence[Gate], batches: Any) -> list[Usage]:
    """Run the batches in evaluation, without gradients, and count; the model and the random state stay as they were."""
    two_sided = "decoder_input_ids" in argument_names(model)
    tallies = [Tally(gate, two_sided and "decoder" in gate.name.split(".")) for gate in gates]
    with watched(tallies), _still(model), torch.no_grad():
        for args, kwargs in _calls(batches, next(model.parameters()).device):
            arguments = by_name(argument_names(model), args, kwargs)
            for tally in tallies:
                tally.arguments = arguments
            model(*args, **kwargs)
            for tally in tallies:
                tally.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _over_ranks(tallies, next(model.parameters()).device)
    return [tally.usage() for tally in tallies]


def _over_ranks(tallies: Sequence[Tally], device: torch.device) -> None:
    """Every rank takes the same path: that of all their samples."""
    for tally in tallies:
        size = torch.tensor(len(tally.count), device=device)
        torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
        empty = torch.zeros(int(size), dtype=torch.double)
        parts = [tally.count, tally.weight] if tally.tokens else [empty, empty]
        total = torch.cat([*parts, torch.tensor([tally.tokens], dtype=torch.double)]).to(device)
        torch.distributed.all_reduce(total)
        total = total.cpu()
        tally.count, tally.weight, tally.tokens = total[:size], total[size:-1], int(total[-1])


@contextmanager
def watched(tallies: Sequence[Tally]) -> Iterator[None]:
    hooks = []
    for tally in tallies:
        hooks.append(tally.gate.module.register_forward_hook(tally.at_gate, with_kwargs=True))
        if tally.router is not tally.gate.module:
            hooks.append(tally.router.register_forward_hook(tally.at_router, with_kwargs=True))
        hooks += [module.register_forward_pre_hook(tally.before_experts, with_kwargs=True) for module in tally.experts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In evaluation, and with buffers and random state put back."""
    training = [module for module in model.modules() if module.training]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        kind = next(model.parameters()).device.type
        stack.enter_context(torch.random.fork_rng([]) if kind == "cpu" else torch.random.fork_rng(device_type=kind))
        stack.enter_context(warnings.catch_warnings())
        # reentrant checkpointing says so of any forward without gradients
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            put_back(buffers)
            reshard(model)


def reshard(model: nn.Module) -> None:
    """After a forward FSDP2 leaves the root's parameters gathered: other tensors than those that the optimizer holds."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


def put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            if buffer.shape == value.shape:
                buffer.copy_(value)


def _calls(batches: Any, device: torch.device) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A mapping, a tensor or a tuple of arguments is one batch, whatever else can be iterated is several."""
    for batch in [batches] if isinstance(batches, (Mapping, Tensor, tuple)) else batches:
        if isinstance(batch, Mapping):
            yield (), {key: _on(value, device) for key, value in batch.items()}
        else:
            yield tuple(_on(value, device) for value in (batch if isinstance(batch, (tuple, list)) else (batch,))), {}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
