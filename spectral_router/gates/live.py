"""What a recipe needs besides tokens, as it is when asked for: parameters, constants, numbers that are attributes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from .nodes import Call

_CHANGES = re.compile(r"temp|tau|scale|sharp|anneal|beta|gamma", re.I)


@dataclass
class Own:
    """A parameter or buffer, as it is when asked for."""

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        value: Tensor = getattr(self.module, self.name)
        return value


@dataclass
class Constant:
    value: Tensor

    def __call__(self) -> Tensor:
        return self.value


@dataclass
class Number:
    """A float attribute, or one over it, as it is when asked for: a temperature that is annealed, say."""

    module: nn.Module
    name: str
    inverse: bool

    def __call__(self) -> float:
        value: float = getattr(self.module, self.name)
        return 1 / value if self.inverse else value


def modules_of(call: Call | None) -> list[nn.Module]:
    modules = []
    while call is not None:
        modules.append(call.module)
        call = call.outer
    return modules


def named_number(value: float, modules: list[nn.Module]) -> Number | float:
    """The attribute that a number of a forward is, if there is no doubt."""
    found = [
        Number(module, name, inverse)
        for inverse in (False, True)
        for module in dict.fromkeys(modules)
        for name, own in vars(module).items()
        if type(own) is float and own and (1 / own if inverse else own) == value
    ]
    called = [number for number in found if _CHANGES.search(number.name)]
    if called:
        return called[0]
    return found[0] if len({(id(n.module), n.name) for n in found}) == 1 and value != 1 else value
