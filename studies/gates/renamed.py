"""A model with nothing left that a name could tell: modules, parameters, counts and classes are called at random."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from .cases import Case

__all__ = ["anonymous", "rename_"]

_PLAIN = (int, float, str, bool)


def rename_(model: nn.Module, seed: int) -> nn.Module:
    """Rename, in place, what the classes of a model call their own; torch's own layers keep "weight" and "bias".

    The forward finds everything under the old names still, as these lead to the new ones; who lists the model's parts, its
    attributes or its classes sees random words only.
    """
    generator = random.Random(seed)
    kinds: dict[type, type] = {}
    for module in list(model.modules()):
        kind = type(module)
        if kind.__module__.startswith("torch.nn."):
            continue
        names: dict[str, str] = {}
        listed = isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict, nn.ParameterList))
        for table in (module._modules, module._parameters, module._buffers) if not listed else ():
            _rename_in(table, list(table), kind, names, generator)
        own = [key for key, value in vars(module).items() if isinstance(value, _PLAIN) or hasattr(value, "to_dict")]
        _rename_in(
            module.__dict__, [key for key in own if not key.startswith("_") and key != "training"], kind, names, generator
        )
        module.__dict__["_called"] = names
        if kind not in kinds:
            kinds[kind] = type(_word(generator).title(), (kind,), {"__getattr__": _look_up, "__module__": __name__})
        module.__class__ = kinds[kind]
    return model


def _rename_in(table: dict[str, Any], keys: Iterable[str], kind: type, names: dict[str, str], generator: random.Random) -> None:
    """The same entries in the same order. What the class has under the same name would be found instead, so it stays."""
    for key in list(table):
        value = table.pop(key)
        if key in keys and not hasattr(kind, key) and not key.isdigit():
            names[key] = _word(generator)
        table[names.get(key, key)] = value


def _word(generator: random.Random) -> str:
    # no letters of which "gate" or "router" could be made by chance
    return "q" + "".join(generator.choices(string.ascii_lowercase.replace("g", "").replace("r", ""), k=7))


def _look_up(self: nn.Module, name: str) -> Any:
    new = self.__dict__.get("_called", {}).get(name)
    return getattr(self, new) if new is not None else nn.Module.__getattr__(self, name)


def anonymous(case: Case, seed: int = 0) -> Case:
    """The same case with a renamed model."""
    build: Callable[[], tuple[nn.Module, dict[str, Any]]] = case.build

    def renamed() -> tuple[nn.Module, dict[str, Any]]:
        model, inputs = build()
        return rename_(model, seed), inputs

    return replace(case, build=renamed)
