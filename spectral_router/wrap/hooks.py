"""The hooks that `wrap_moe` registers. Classes of their own, not closures, so that models pickle."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .recorder import Recorder


class Hook:
    """A hook that knows its handle."""

    def __init__(self, handle: Recorder, index: int = -1) -> None:
        self.handle = handle
        self.index = index

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # A copy of the whole model gets a handle of its own. A copy of a part is an adapter library's: it reports to this one.
        if id(self.handle.model) not in memo:
            return self
        return type(self)(copy.deepcopy(self.handle, memo), self.index)


class BeforeModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handle.begin(args, kwargs)


class AfterModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle.finish(output)


class AtGate(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.handle.at_gate(self.index, module, args, kwargs, output)
