"""One gate as a checkpoint has it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class StoredGate:
    """A gate of a checkpoint: its matrix, read, and what was learned of it on the way.

    name: as the live model calls it, where the model is known, else as the file does.
    key: the name of its tensor in the file.
    weight: `(experts, dim)`, in float32 or better.
    selection_bias: added to the scores for the choice alone, `(experts,)`; None if there is none.
    scoring: what makes probabilities of logits, None where nothing tells.
    notes: what a reader should know of how it was found or read.
    """

    name: str
    key: str
    weight: Tensor = field(repr=False)
    selection_bias: Tensor | None = field(default=None, repr=False)
    scoring: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        return self.weight.shape[1]
