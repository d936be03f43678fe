"""A path: which experts of each layer, how they were found, as a table and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .delta import Entry, write


@dataclass(frozen=True)
class Layer:
    """The experts of one gate.

    Args:
        gate: its name.
        num_experts: K.
        experts: on the path, the most important first.
        tokens: of the sample, that came by.
        share: the part of the choices that fell on these experts, in [0, 1].
        weight: their part of the combine weights, in [0, 1].
        parameters: how many numbers of the model may change here.
    """

    gate: str
    num_experts: int
    experts: tuple[int, ...]
    tokens: int
    share: float
    weight: float
    parameters: int = 0


class ExpertPath:
    """Which experts of each layer an update may change; what `surgical` gives.

    Attributes:
        layers: list of `Layer`, in the order of the model.
        rule: how they were found: the arguments of `surgical`.

    `print(path)` is a table of them.
    """

    def __init__(self, layers: Sequence[Layer], rule: Mapping[str, Any] | None = None) -> None:
        self.layers = list(layers)
        self.rule = dict(rule or {})
        self.total = 0  # of numbers in the model
        self.entries: list[Entry] = []  # what may change, and what it was

    def bind(self, entries: list[Entry], parameters: Mapping[str, int], total: int) -> None:
        """Note what of a model the path covers."""
        self.entries, self.total = entries, total
        self.layers = [replace(layer, parameters=parameters.get(layer.gate, 0)) for layer in self.layers]

    def save(self, file: str | Path) -> None:
        """Write the path as JSON."""
        text = json.dumps({"format": "spectral-router path 1", "rule": self.rule, "layers": [asdict(x) for x in self.layers]})
        Path(file).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> ExpertPath:
        """Read a path that `save` wrote.

        Raises:
            ValueError: the file is none.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
            layers = [Layer(**{**layer, "experts": tuple(layer["experts"])}) for layer in data["layers"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no path as ExpertPath.save writes it: {error!r}") from error
        return cls(layers, data.get("rule"))

    def save_delta(self, file: str | Path) -> int:
        """Write what the update has changed, and nothing else, as safetensors; returns the number of numbers in it.

        Each slice whose bits differ from what they were when the context was entered, with a digest of what they were.

        Raises:
            RuntimeError: the path was not in use on a model.
        """
        if not self.total:
            raise RuntimeError(
                "the path has not been in use, so nothing can have changed; save_delta() belongs to the path that "
                "`with surgical(...) as path` gives"
            )
        return write(file, self.entries, {"rule": self.rule, "experts": {x.gate: list(x.experts) for x in self.layers}})

    def __repr__(self) -> str:
        head = ("gate", "experts", "share of tokens", "of weights", "parameters")
        rows = [head]
        for layer in self.layers:
            some = ", ".join(map(str, layer.experts[:12])) + (", ..." if len(layer.experts) > 12 else "")
            experts = f"{some or 'none'} of {layer.num_experts}"
            rows.append((layer.gate, experts, f"{layer.share:.3f}", f"{layer.weight:.3f}", f"{layer.parameters:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.total:
            changing = sum({entry.key: entry.part.numel for entry in self.entries}.values())
            lines.append(f"{changing:,} of {self.total:,} parameters may change ({changing / self.total:.2%})")
        return "\n".join(lines)
