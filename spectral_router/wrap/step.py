"""What one forward of a wrapped model notes down, until its term is made and has had its backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of a gate in one forward of the model."""

    gate: int  # its number
    scores: Tensor | None  # probabilities, or logits, as the balance loss reads them; None: the gate is frozen
    weight: Tensor
    layout: torch.Size  # of the gate's input
    live: bool = True  # False: stand-ins, which learn only if the call is run again


@dataclass
class Step:
    """What lives no longer than a step: a copy or a file of a wrapped model starts with a new one."""

    open: bool = False  # the model's forward is running, in training
    calls: list[Call] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    term: Tensor | None = None  # waits for handle.loss()
    fate: str = ""  # what became of the last term
    without_backward: int = 0
    # by gate: stand-ins of calls that had no graph, until they are run again with one
    deferred: dict[int, list[list[Tensor]]] = field(default_factory=dict)
