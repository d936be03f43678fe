"""Kernels and waits of one step of every hot path, counted by the profiler.

    python -m benchmarks.launches

On a GPU: kernels that are launched, and calls in which the host waits for the device. On a CPU, where there is neither, the
operators that are called; that nothing would wait is a test, `tests/test_no_waiting.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, LossFreeBias, PrototypeRouter, SpectralRankPenalty, wrap_moe

from ._harness import Report, device, parser, progress, publish, quiet_stderr
from .penalty import at_the_step, gates, ours
from .wrap import build

_KERNEL = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAIT_CUDA = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Counted(NamedTuple):
    """Of one call: kernels and waits on a GPU; operators, and nothing that could wait, on a CPU."""

    launched: int
    waits: int | None


def count(call: Callable[[], object]) -> Counted:
    """After two calls of it, and without what the profiler itself does."""
    for _ in range(2):
        call()
    names, own = _profiled(call), _profiled(lambda: None)
    if device().type != "cuda":
        return Counted(sum(name.startswith("aten::") for name in names), None)
    waits, own_waits = (sum(name in _WAIT_CUDA for name in of) for of in (names, own))
    return Counted(sum(name.startswith(_KERNEL) for name in names), max(waits - own_waits, 0))


def _profiled(call: Callable[[], object]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device().type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with quiet_stderr(), torch.profiler.profile(activities=activities) as profile:
        call()
    return [event.name for event in profile.events()]


def paths(quick: bool) -> dict[str, Callable[[], object]]:
    experts, dim, layers = (8, 64, 2) if quick else (64, 2048, 16)
    weights = gates(layers, experts, dim)
    found: dict[str, Callable[[], object]] = {}
    for solver in ("auto", "exact", "power"):
        penalty = SpectralRankPenalty(relative=True, solver=solver)
        found[f"penalty of {layers} x ({experts}, {dim}), {solver}"] = partial(ours, weights, penalty)
    found["the same, at the step"] = at_the_step(weights)
    tokens = torch.randn(64 if quick else 4096, dim, device=device())
    scores = torch.randn(len(tokens), experts, device=device(), requires_grad=True)
    balance = LoadBalanceLoss()
    found["balance loss"] = lambda: balance(scores.softmax(-1)).backward()
    for name, controller in (("", None), (", with LossFreeBias", LossFreeBias(experts))):
        router = PrototypeRouter(dim, experts, top_k=2, controller=controller).to(device())
        found[f"PrototypeRouter{name}"] = partial(route, router, tokens)
    return found


def route(router: PrototypeRouter, tokens: Tensor) -> None:
    router(tokens).weights.sum().backward()


def train_steps(quick: bool) -> dict[str, Callable[[], object]]:
    model = build(*((2, 64, 64, 4) if quick else (8, 512, 512, 8))).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.randint(1024, (2, 64), device=device())

    def step(model: nn.Module = model) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def wrapped(at_step: bool) -> Callable[[], None]:
        def run() -> None:
            if not hasattr(run, "handle"):
                run.handle = wrap_moe(model, optimizer if at_step else None)  # type: ignore[attr-defined]
            step()

        return run

    return {"model, bare": step, "model, wrapped": wrapped(False), "model, at the step": wrapped(True)}


def measure(repeats: int, quick: bool) -> list[Report]:
    what = "kernels" if device().type == "cuda" else "operators"
    report = Report(f"One step of each hot path on {device().type}", ["path", what, "waits"])
    for name, call in {**paths(quick), **train_steps(quick)}.items():
        progress(name)
        launched, waits = count(call)
        handle = getattr(call, "handle", None)
        if handle is not None:
            handle.remove()
        report.raw[name] = {what: [float(launched)]} | ({} if waits is None else {"waits": [float(waits)]})
        report.rows.append([name, str(launched), "-" if waits is None else str(waits)])
    return [report]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("launches", __doc__, repeats=1).parse_args(argv)
    publish(measure(1, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
