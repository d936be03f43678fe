"""The gates of a checkpoint: by its config where that names a model, else by names and shapes; then their bytes."""

from __future__ import annotations

from torch import Tensor

from .by_config import Named, gates_by_config
from .by_name import ByName, gates_by_name, selection_bias_beside
from .quantised import is_packed, numbers_of
from .stored import Checkpoint
from .stored_gate import StoredGate


def stored_gates(checkpoint: Checkpoint) -> tuple[list[StoredGate], list[str]]:
    """Every gate, read, and what a reader should know of the search.

    Raises:
        ValueError: no gate is found; the sentence lists near misses. Or one cannot be read.
    """
    notes: list[str] = []
    known = gates_by_config(checkpoint)
    named: list[Named] = [] if isinstance(known, str) else [gate for gate in known if gate.key is not None]
    if isinstance(known, str):
        notes += [f"{known}; the gates are found by names and shapes"] if known else []
    elif missing := [gate.gate.name for gate in known if gate.key is None]:
        notes.append(f"in the model of config.json, but not in the file: {_some(missing)}")
    if named:
        return [_read_named(checkpoint, gate) for gate in named], notes
    by_name, misses = gates_by_name(checkpoint)
    if not by_name:
        near = f" (near misses, whose shapes fit no number of experts: {_some(misses)})" if misses else ""
        raise ValueError(f"{checkpoint.path} has no router gate among its {len(checkpoint.tensors)} tensors{near}")
    if misses:
        notes.append(f"named like gates, but of other shapes: {_some(misses)}")
    return [_read_by_name(checkpoint, gate) for gate in by_name], notes


def _read_named(checkpoint: Checkpoint, named: Named) -> StoredGate:
    assert named.key is not None
    tensor, note = numbers_of(checkpoint, named.key)
    weight = named.weight(tensor)
    gate = named.gate
    notes = [note] if note else []
    if gate.assumed:
        notes.append(f"scoring assumed: {gate.scoring}")
    bias = _selection_bias(checkpoint, named.bias_key, gate.num_experts)
    return StoredGate(gate.name, named.key, weight, bias, gate.scoring, notes)


def _read_by_name(checkpoint: Checkpoint, found: ByName) -> StoredGate:
    tensor, note = numbers_of(checkpoint, found.key)
    tensor = tensor.reshape(found.num_experts, -1) if tensor.ndim == 1 else tensor
    weight = tensor.mT if found.transposed else tensor
    said = checkpoint.says("scoring_func", "score_function", "router_score_function", "moe_router_score_function")
    scoring = said if said in ("softmax", "sigmoid") else None
    beside = selection_bias_beside(checkpoint, found.key, found.num_experts)
    bias = _selection_bias(checkpoint, beside, found.num_experts)
    return StoredGate(found.name, found.key, weight, bias, scoring, [text for text in (note, found.note) if text])


def _selection_bias(checkpoint: Checkpoint, name: str | None, num_experts: int) -> Tensor | None:
    if name is None or is_packed(checkpoint, name):
        return None
    bias = checkpoint.tensors[name].read().float().flatten()
    return bias if len(bias) == num_experts else None


def _some(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
