"""What makes probabilities of a gate's logits, by name, and how the attributes and the source of a model tell which it is."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normalised(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def probs(logits: Tensor) -> Tensor:
        scores = score(logits)
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

    return probs


RAW_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def _product_keys(logits: Tensor) -> Tensor:
    """Doge cuts its logits in two along the flattened batch, as is done here, and scores row keys and column keys apart."""
    rows, columns = logits.reshape(2, -1, logits.shape[-1] // 2).softmax(-1)
    return torch.cat([rows, columns], -1) / 2


# logits (*, K) -> probs (*, K), by the name of the scoring
SCORES = {name: score if name == "softmax" else _normalised(score) for name, score in RAW_SCORES.items()}
SCORES["relu"] = _normalised(F.relu)
SCORES["product_keys"] = _product_keys


def named_scoring(modules: list[nn.Module | None]) -> str:
    """Scoring as attributes name it, as in `score_func="sigmoid"`, else as the source of the nearest class applies it."""
    present = [module for module in modules if module is not None]
    for module in present:
        if getattr(module, "routing_type", None) == "sinkhorn":  # Megatron-Core's, which leaves its score_function unused
            return "sigmoid" if getattr(module, "topk", None) == 1 else "softmax"
        for holder in (module, vars(module).get("config"), vars(module).get("args")):
            for key, value in {**getattr(holder, "__dict__", {}), **getattr(holder, "_modules", {})}.items():
                if re.search(r"scor|gating_f|gate_f|router_act", key) and (isinstance(value, str) or callable(value)):
                    said = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
                    for name in RAW_SCORES:
                        if name in said.lower().replace("_", ""):
                            return name
    for module in present:
        text = ""
        for source in sources_of(module):
            text += source
            if "super().forward(" not in source and (
                named := {n for n in ("sigmoid", "softmax") if re.search(rf"(?i){n}\w*\(", text)}
            ):
                if len(named) == 1:
                    return named.pop()
                break  # both: it may say which in another place
    return "softmax"


def multiplied_from_left(owner: nn.Module, name: str) -> bool:
    """Whether a square matrix is (dim, experts), as in x @ W; by the source, else by the name."""
    if found := re.search(rf"@ *self\.{name}\b(\.m?T\b|\.t\()?|linear\([^()]*self\.{name}\b", source_of(owner)):
        return found[0].startswith("@") and not found[1]
    return name.startswith(("w_", "sim_"))


def source_of(module: nn.Module) -> str:
    return "".join(sources_of(module))


def sources_of(module: nn.Module) -> list[str]:
    """The source of the module's class and of those it is made from, nearest first, up to torch's own."""
    kinds = type(module).__mro__
    own = next(place for place, kind in enumerate(kinds) if kind.__module__.startswith("torch.nn."))
    return [_source_of_class(kind) for kind in kinds[:own]]


@functools.lru_cache(maxsize=128)  # a model has many modules of a few classes, and finding the lines of one is slow
def _source_of_class(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined where there is no file
        return ""
