"""What may change while a model adapts to a domain: everything, all experts, or the experts that take the domain's tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.shared.storage import going_on, read_json, write_json
from spectral_router import ExpertPath, Gate, surgical

from .config import Config
from .measure import writes

# windows of the domain that the path is read from
SAMPLE = 64


@contextlib.contextmanager
def adapting(config: Config, target: Any, gates: Sequence[Gate], rows: Tensor, file: Path) -> Iterator[ExpertPath | None]:
    """Freeze what --adapt-scope leaves out. rows (windows, tokens): what training goes on with; `target`: model or handle.

    A path is found once and kept in `file`, as a resumed run has other weights. None: everything may change.
    """
    if config.adapt_scope == "all":
        yield None
        return
    if config.adapt_scope == "experts":
        surgery = surgical(target, path={gate.name: range(gate.num_experts) for gate in gates})
    elif file.exists():
        with going_on(file):
            surgery = surgical(target, path=read_json(file)["path"])
    else:
        batches = [{"input_ids": batch, "use_cache": False} for batch in rows[:SAMPLE].split(config.batch_size)]
        surgery = surgical(target, batches, share=config.adapt_share)
        if writes():
            write_json(file, {"path": {layer.gate: layer.experts for layer in surgery.path.layers}})
    with surgery as path:
        yield path
