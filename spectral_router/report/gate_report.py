"""Everything that is said of one gate of one checkpoint."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .certified import certified_shares
from .fresh import fresh
from .geometry import Geometry, geometry
from .stored_gate import StoredGate
from .verdicts import Verdict, verdicts

_PAIRS = 5  # closest pairs that are listed


@dataclass(eq=False)
class GateReport:
    """One gate: where it is, its numbers, what a fresh one would have, and the verdicts.

    name, key: in the model, in the file. layer: the last number in the name before the gate, None if it has none.
    geometry: the numbers of the matrix, None if it holds NaN or inf. See `Geometry`.
    fresh: for each scale-free number the 5 %, 50 % and 95 % quantile over fresh gates of this shape.
    bias_spread: largest less smallest entry of the selection bias, None if there is none.
    certified: by format (bf16, fp8, int8), the share of rows that rounding cannot make another expert's.
    closest_pairs: (i, j, cosine, distance) of the nearest rows, nearest first.
    weight: the matrix, for comparisons.
    """

    name: str
    key: str
    layer: int | None
    num_experts: int
    dim: int
    scoring: str | None
    geometry: Geometry | None
    fresh: dict[str, tuple[float, float, float]]
    bias_spread: float | None
    certified: dict[str, float]
    closest_pairs: list[tuple[int, int, float, float]]
    verdicts: list[Verdict]
    notes: list[str]
    weight: Tensor = field(repr=False)

    @property
    def verdict(self) -> str:
        """The verdicts in one line."""
        return "; ".join(map(str, self.verdicts))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON knows them; the matrices of cosines and distances are left out."""
        numbers: dict[str, Any] = {}
        if self.geometry is not None:
            for name, value in vars(self.geometry).items():
                if isinstance(value, float):
                    numbers[name] = value if math.isfinite(value) else None
            numbers["row_norms"] = self.geometry.row_norms.tolist()
        return {
            "name": self.name,
            "key": self.key,
            "layer": self.layer,
            "num_experts": self.num_experts,
            "dim": self.dim,
            "scoring": self.scoring,
            **numbers,
            "bias_spread": self.bias_spread,
            "closest_pairs": [
                {"experts": [i, j], "cosine": cosine, "distance": distance, "certified": distance / 2}
                for i, j, cosine, distance in self.closest_pairs
            ],
            "certified_share": self.certified,
            "fresh": {name: dict(zip(("low", "median", "high"), q, strict=True)) for name, q in self.fresh.items()},
            "verdicts": [{"word": v.word, "experts": list(v.experts), "rule": v.rule} for v in self.verdicts],
            "notes": self.notes,
        }


def report_of(gate: StoredGate, top_k: int | None = None, grouped: bool = False) -> GateReport:
    """The report of one gate."""
    weight, usual = gate.weight, fresh(gate.num_experts, gate.dim)
    found: Geometry | None = None
    pairs: list[tuple[int, int, float, float]] = []
    shares: dict[str, float] = {}
    bad = int((~weight.isfinite()).sum())
    if bad:
        told = [Verdict("broken", f"{bad} of {weight.numel()} entries are NaN or inf")]
    else:
        found = geometry(weight)
        shares = certified_shares(weight, found.distances)
        first, second = torch.triu_indices(len(weight), len(weight), 1)
        order = found.distances[first, second].argsort()[:_PAIRS]
        pairs = [
            (i, j, found.cosines[i, j].item(), found.distances[i, j].item())
            for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True)
        ]
        told = verdicts(found, usual, gate.selection_bias, top_k, grouped)
    bias = gate.selection_bias
    spread = None if bias is None else (bias.max() - bias.min()).item()
    return GateReport(
        gate.name,
        gate.key,
        layer_of(gate.name),
        gate.num_experts,
        gate.dim,
        gate.scoring,
        found,
        usual,
        spread,
        shares,
        pairs,
        told,
        gate.notes,
        weight,
    )


def layer_of(name: str) -> int | None:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
    return int(numbers[-1]) if numbers else None
