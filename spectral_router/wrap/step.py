"""What the forwards of a wrapped model note down, until their term is made and has had its backward or its step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gates.gate import Gate


class Call(NamedTuple):
    """One call of a gate in one forward of the model."""

    scores: Tensor | None  # probabilities, or logits, as the balance loss reads them; None: the gate is frozen
    weight: Tensor
    layout: torch.Size  # of the gate's input
    live: bool = True  # False: stand-ins, which learn only if the call is run again
    mask: Tensor | None = None  # what the gate itself was told: True where a token is no padding


class StandIns(NamedTuple):
    """Leaves in place of what a call without a graph gave, until it is run again with one."""

    scores: Tensor
    weight: Tensor
    born: int  # how many of this gate's had been taken by then


@dataclass(eq=False)
class Pull:
    """What the balance losses of the micro-batches since the last optimizer step ask of one gate: sums of gradients."""

    weight: Tensor  # (K, D), with respect to the effective weight
    bias: Tensor | None  # (K,)
    count: Tensor  # (), forwards that are in them

    def clear(self) -> None:
        for tensor in (self.weight, self.bias, self.count):
            if tensor is not None:
                tensor.zero_()


@dataclass(eq=False)
class Tap:
    """One gate and what its calls have left. Hooks hold this and no number, so that equal blocks compile to one graph."""

    gate: Gate
    decoding: bool = False  # a gate of the decoder of a model with two sides
    part: int = 0  # of a model in several parts: the one it is in
    padding: int | None = None  # which argument of the gate says what is padding
    inputs: list[tuple[Any, Any, bool]] = field(default_factory=list)  # what its calls in the forward that runs were given
    calls: list[Call] = field(default_factory=list)  # of the forward that runs
    deferred: list[StandIns] = field(default_factory=list)
    taken: int = 0  # how many stand-ins have been run again
    seen: bool = False  # it has been recorded once
    gone: bool = False  # its module is no longer in the model
    plain: bool | None = None  # its logits are W x + b; None: not seen yet
    pull: Pull | None = None  # where the term goes to the optimizer's step

    def again(self, tokens: Tensor, with_graph: bool) -> bool | None:
        """Whether the gate has had these tokens in this forward, unchanged since, as where it is run again for a report.

        None: it has, but without a graph, so that this call is to take the place of that one.
        """
        base = tokens if tokens._base is None else tokens._base
        place = (tokens.storage_offset(), tokens.shape, tokens._version)  # a base and its views share the version
        for number, (old, where, live) in enumerate(self.inputs):
            if old() is base and where == place:
                if live or not with_graph:
                    return True
                self.inputs[number] = (old, where, True)
                return None
        self.inputs.append((weakref.ref(base), place, with_graph))
        return False

    def __getstate__(self) -> dict[str, Any]:  # nothing of a step is copied or saved
        return {"gate": self.gate, "decoding": self.decoding, "part": self.part, "padding": self.padding, "seen": self.seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass
class Step:
    """What lives no longer than a step: a copy or a file of a wrapped model starts with a new one."""

    taps: list[Tap] = field(default_factory=list)
    open: bool = False  # the model's forward is running, in training
    root: nn.Module | None = None  # the model, or the part of it, whose forward was the last
    arguments: dict[str, Any] = field(default_factory=dict)
    term: Tensor | None = None  # waits for handle.loss()
    fate: str = ""  # what became of the last term
    shared: bool = False  # the term is this forward's share of a step already
    evaluated: bool = False  # the last forward was one of evaluation
    without_backward: int = 0  # forwards in a row whose term saw no backward
    forwards: int = 0  # recorded ones since the last optimizer step
    arrived: bool = False  # a backward has reached a term since the last optimizer step

    @property
    def deferred(self) -> dict[int, list[StandIns]]:
        """By the gate's number: stand-ins that wait."""
        return {number: tap.deferred for number, tap in enumerate(self.taps)}
