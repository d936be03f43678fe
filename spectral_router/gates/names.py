"""Names of gates without the shells that engines put around modules: the same with and without checkpointing or DDP."""

from __future__ import annotations

from typing import Any

from torch import nn

_SHELLS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"}
# classes whose child `module` is what they wrap; in anything else it is a name like others
_ENGINES = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine", "Float16Module"}


def bare_name(model: nn.Module, path: str) -> str:
    """The path of a module or parameter in the model, without the segments of shells."""
    kept = []
    place: Any = model
    for segment in path.split("."):
        if segment not in _SHELLS and not (segment == "module" and type(place).__name__ in _ENGINES):
            kept.append(segment)
        place = getattr(place, segment, None)
    return ".".join(kept)


def bare_text(path: str) -> str:
    """The same of a name alone, as states saved before hold it: whatever may be a shell is left out."""
    return ".".join(segment for segment in path.split(".") if segment not in {*_SHELLS, "module"})
