"""The hooks that `wrap_moe` registers. Classes of their own, not closures, so that models pickle."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .recorder import Recorder
from .step import Tap


class Hook:
    """A hook that knows its handle, and at a gate what is noted there."""

    def __init__(self, handle: Recorder, tap: Tap | None = None, part: int = 0) -> None:
        self.handle = handle
        self.tap = tap
        self.part = part

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # A copy of the whole model gets a handle of its own. A copy of a part is an adapter library's: it reports to this one.
        if id(self.handle.model) not in memo:
            return self
        return type(self)(copy.deepcopy(self.handle, memo), copy.deepcopy(self.tap, memo), self.part)


class BeforeModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle = self.handle.of_this_thread() if _is_replica(module) else self.handle
        handle.begin(self.part, args, kwargs)


class AfterModel(Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        handle = self.handle.of_this_thread() if _is_replica(module) else self.handle
        return handle.finish(output)


class AtGate(Hook):
    tap: Tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if _is_replica(module):
            handle = self.handle.of_this_thread()
            return handle.at_gate(handle.taps[self.handle.taps.index(self.tap)], module, args, kwargs, output)
        return self.handle.at_gate(self.tap, module, args, kwargs, output)


def _is_replica(module: nn.Module) -> bool:
    """Whether this is one of DataParallel's copies, which run in threads of their own and share the original's hooks."""
    return getattr(module, "_is_replica", False)
