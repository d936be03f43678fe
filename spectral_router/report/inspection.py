"""`inspect_checkpoint`: everything that is said of the gates of one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import open_checkpoint
from .find_stored import stored_gates
from .gate_report import GateReport, report_of
from .stored import Checkpoint

_OVER_DEPTH = ("spectral_norm", "stable_rank", "effective_rank", "centred_stable_rank", "condition", "energy", "closest")


@dataclass(eq=False)
class CheckpointReport:
    """What a checkpoint tells of its routers.

    path, kind: where it is, and its format. model, family: the class that config.json names, and its model_type.
    top_k: experts a token, if config.json says it.
    gates: one `GateReport` a gate, in the order of the model. notes: what a reader should know of how they were found.
    """

    path: str
    kind: str
    model: str | None
    family: str | None
    top_k: int | None
    gates: list[GateReport]
    notes: list[str]

    def over_depth(self) -> dict[str, dict[str, float]]:
        """For each number its least, lower quartile, median, upper quartile and largest over the gates."""
        told = {}
        for name in _OVER_DEPTH:
            values = [getattr(gate.geometry, name) for gate in self.gates if gate.geometry is not None]
            finite = torch.tensor([value for value in values if value < float("inf")], dtype=torch.float64)
            if len(finite):
                steps = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
                quantiles = torch.quantile(finite, steps).tolist()
                told[name] = dict(zip(("least", "lower", "median", "upper", "largest"), quantiles, strict=True))
        return told

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        return {
            "checkpoint": self.path,
            "format": self.kind,
            "model": self.model,
            "top_k": self.top_k,
            "notes": self.notes,
            "over_depth": self.over_depth(),
            "gates": [gate.to_dict() for gate in self.gates],
        }


def inspect_checkpoint(path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> CheckpointReport:
    """The routers of a checkpoint, read from its file: names and shapes of all tensors, then the gates' bytes, no others.

    Formats: safetensors and `torch.save`, in one file or sharded with an index; a folder of `torch.distributed.checkpoint`;
    GGUF. A name such as "org/model" is looked up in the local cache of the hub. Nothing is downloaded, and no code of a file
    is run.

    With a config.json of a model that transformers knows, its gates are those that `find_gates` finds in the model built
    without memory; else names and shapes beside the experts decide, and what is uncertain is said in `notes`.

    Args:
        path: a folder, a file, or the name of a model.
        progress: called with the number of gates done and of all.

    Raises:
        ValueError: it is no checkpoint, is damaged or incomplete, has no gate, or a gate that cannot be read; in one sentence.
        ModuleNotFoundError: its format needs a package that is missing.

    >>> import tempfile, torch
    >>> weights = {"router.weight": torch.eye(4, 16), **{f"experts.{i}.weight": torch.ones(16, 16) for i in range(4)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(weights, f"{folder}/model.pt")
    ...     report = inspect_checkpoint(f"{folder}/model.pt")
    >>> report.gates[0].name, report.gates[0].geometry.stable_rank, report.gates[0].verdict
    ('router', 4.0, 'healthy')
    """
    checkpoint = open_checkpoint(path)
    gates, notes = stored_gates(checkpoint)
    top_k = _whole(checkpoint, "num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "experts_per_token")
    groups = _whole(checkpoint, "n_group", "num_expert_group") or 1
    reports = []
    for done, gate in enumerate(gates):
        if progress is not None:
            progress(done, len(gates))
        reports.append(report_of(gate, top_k, groups > 1))
    if progress is not None:
        progress(len(gates), len(gates))
    family = checkpoint.config.get("model_type")
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("gguf_architecture")]
    model = names[0] if isinstance(names, list) and isinstance(names[0], str) else None
    return CheckpointReport(
        str(path), checkpoint.kind, model, family if isinstance(family, str) else None, top_k, reports, notes
    )


def _whole(checkpoint: Checkpoint, *keys: str) -> int | None:
    value = checkpoint.says(*keys)
    return value if type(value) is int and value > 0 else None
