"""What stands in on a CPU for a GPU that engines ask for by name: devices, streams, random states."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Every request for the device "cuda" is one for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        args = tuple("cpu" if isinstance(a, (str, torch.device)) and str(a).startswith("cuda") else a for a in args)
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        found = func(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if name == "type" and isinstance(found, str) else found


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: _Stream()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...


def no_cuda() -> None:
    """Let this process, and what is imported after this, take the CPU for its GPU."""
    OnCPU().__enter__()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda._lazy_init = cuda.random._lazy_init = lambda: None
    generator = type("Generator", (), {"set_state": staticmethod(torch.set_rng_state)})
    cuda.default_generators = defaultdict(generator)
    cuda._lazy_call = lambda call: call()
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = cuda.Event = _Stream
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Stream())
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
