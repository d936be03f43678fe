"""What a case of the survey is: a tiny model, its gates as read by a human, and their true routing probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "ExpectedGate", "ReadProbs", "normalised", "seeded"]

# (module, positional arguments, output) of a forward pass -> the routing probabilities in it
ReadProbs = Callable[[nn.Module, tuple[Any, ...], Any], Tensor]


@dataclass(frozen=True)
class ExpectedGate:
    """One gate of a model, written down by hand, and how to see its probabilities.

    parameter: full name, in `model.named_parameters()`, of the matrix that scores the experts.
    num_experts: K, the length of a row of logits; zero and skip experts count where the logits include them.
    scoring: "softmax", "sigmoid", "sqrtsoftplus" or "product_keys".
    module: full name of the module whose forward pass shows the probabilities.
    read: takes `(module, arguments, output)` of that forward pass to the probabilities, `(*, K)`.
    """

    parameter: str
    num_experts: int
    scoring: str
    module: str = field(repr=False)
    read: ReadProbs = field(repr=False)


@dataclass(frozen=True)
class Case:
    """A tiny model and everything that is true about its gates.

    build: makes the model, seeded, and the keyword inputs of one forward pass.
    expected: every gate, in the order in which a forward pass runs them; empty for a model that has none.
    runs: False if the model can be built but no forward pass is possible.
    """

    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]] = field(repr=False)
    expected: tuple[ExpectedGate, ...]
    runs: bool = True

    @contextmanager
    def truth(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Fill a dict, while open, with the probabilities `(tokens, K)` of each gate that runs, by its module's name.

        They are the FULL probabilities: over all experts, of the logits without selection bias and without noise, with gate
        bias, soft cap, scale and temperature; sigmoid scores are divided by their sum. They come from the very forward
        passes that run while the dict is filled, so that jitter and dropout are those passes' own, and they carry gradient.
        Of a gate that runs twice the last pass is kept.
        """
        probs: dict[str, Tensor] = {}

        def record(gate: ExpectedGate, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            probs[gate.module] = gate.read(module, args, output).flatten(0, -2)

        handles = [
            # the probabilities come before any other hook could change the output
            model.get_submodule(gate.module).register_forward_hook(partial(record, gate), prepend=True)
            for gate in self.expected
        ]
        try:
            yield probs
        finally:
            for handle in handles:
                handle.remove()

    def true_probs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        """The probabilities `(tokens, K)` of every expected gate, in order, in one forward pass of their own."""
        with self.truth(model) as probs:
            model(**inputs)
        return [probs[gate.module] for gate in self.expected]


def seeded(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]],
) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    """The same builder, but each call makes the same model and leaves the global random state as it was."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def normalised(scores: Tensor) -> Tensor:
    """Scores that do not compete with each other, as probabilities."""
    return scores / scores.sum(-1, keepdim=True)
