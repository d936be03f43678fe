"""The spectral penalty over all gates of a model, forward + backward, against the literal formula and the memory limit.

    python -m benchmarks.penalty

The limit is what any method must do at least: read every weight twice and write every gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spectral_router import Gate, SpectralRankPenalty, wrap_moe

from ._harness import Report, device, interleave, parser, peak_bytes, progress, publish, show_ms, show_ratio

# name: gates, experts, dim of the real model; gates measured (fewer where the literal formula would take minutes)
MODELS = {
    "paper 4x4": (4, 4, 128, 4),
    "Mixtral-8x7B": (32, 8, 4096, 32),
    "OLMoE-1B-7B": (16, 64, 2048, 16),
    "Qwen3-30B-A3B": (48, 128, 2048, 48),
    "DeepSeek-V3": (58, 256, 7168, 8),
    "Kimi-K2": (60, 384, 7168, 6),
}


def literal(weights: Sequence[nn.Parameter], norm: Callable[[Tensor], Tensor]) -> None:
    """Equations 3 to 5 as printed, gate by gate, with the gradient that autograd finds."""
    total = torch.zeros((), device=weights[0].device)
    for weight in weights:
        sigma = norm(weight)
        rank = weight.square().sum() / sigma.square()
        total = total + ((sigma - 1).square() + (rank / len(weight) - 1).square())
    total.backward()


def ours(weights: Sequence[nn.Parameter], penalty: SpectralRankPenalty) -> None:
    penalty(weights).backward()


def fresh(weights: Sequence[nn.Parameter], call: Callable[[Sequence[nn.Parameter]], None]) -> None:
    """As in training: gradients are dropped after the step, and written to new memory in the next."""
    for weight in weights:
        weight.grad = None
    call(weights)


def limit(stacked: Tensor, gradient: Tensor) -> None:
    """Two reads of the weights and one write into memory that is there already: nothing can be faster."""
    stacked.sum()
    stacked.sum()
    gradient.fill_(1.0)


def limit_fresh(stacked: Tensor) -> None:
    """The same with new memory for the gradient, as autograd hands it out: on a CPU new pages cost more than the write."""
    stacked.sum()
    stacked.sum()
    torch.full_like(stacked, 1.0)


def gates(count: int, experts: int, dim: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(experts, dim, device=device()) * dim**-0.5) for _ in range(count)]


def solvers(weights: Sequence[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """One training step's penalty by each solver; the power solver starts where its last call ended."""
    exact, power = SpectralRankPenalty(relative=True), SpectralRankPenalty(relative=True, solver="power")
    return {
        "exact": partial(fresh, weights, partial(ours, penalty=exact)),
        "power": partial(fresh, weights, partial(ours, penalty=power)),
    }


def step(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor], deliver: Callable[[], object]) -> None:
    """What the hook before an optimizer's step does: the task's gradients are there, and the penalty's are added to them."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    deliver()


def at_the_step(weights: Sequence[nn.Parameter]) -> Callable[[], object]:
    model = nn.ParameterList(weights)
    named = [Gate(str(i), model, len(weight), parameter=str(i), reads="input") for i, weight in enumerate(weights)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wrap_moe(model, optimizer, gates=named, balance=None, penalty=SpectralRankPenalty(relative=True))
    assert handle.at_step is not None
    return handle.at_step.deliver


def peak(weights: Sequence[nn.Parameter], call: Callable[[], object]) -> str:
    """The most that forward and backward hold at once, gradient included, in units of the weights."""
    call()
    for weight in weights:
        weight.grad = None
    return f"{peak_bytes(call) / sum(weight.nbytes for weight in weights):.2f}"


def measure(repeats: int, quick: bool) -> list[Report]:
    speed = Report(
        "Penalty over all gates, forward + backward, against the formula as printed",
        [
            "gates",
            "literal, ms",
            "svdvals, ms",
            "exact, ms",
            "power, ms",
            "at the step, ms",
            "literal / exact",
            "literal / power",
            "literal / at the step",
        ],
    )
    bound = Report(
        "Penalty against the memory limit",
        ["gates", "limit, ms", "exact / limit", "power / limit", "at the step / limit", "limit with new memory, ms",
         "exact / that", "power / that", "peak memory / weights: exact", "power", "literal"],
    )  # fmt: skip
    for name, (layers, experts, dim, count) in MODELS.items():
        progress(name)
        if quick:
            experts, dim, count = min(experts, 16), 64, 3
        weights = gates(count, experts, dim)
        stacked = torch.stack([weight.detach() for weight in weights])
        plain: Callable[[], object] = partial(fresh, weights, partial(literal, norm=lambda w: torch.linalg.matrix_norm(w, 2)))
        values: Callable[[], object] = partial(fresh, weights, partial(literal, norm=lambda w: torch.linalg.svdvals(w)[0]))
        gradients = [torch.randn_like(weight) for weight in weights]
        delivered = {"step": partial(step, weights, gradients, at_the_step(weights))}
        against = interleave({"literal": plain, "svdvals": values, **solvers(weights), **delivered}, repeats)
        limits: dict[str, Callable[[], object]] = {
            "limit": partial(limit, stacked, torch.empty_like(stacked)),
            "new": partial(limit_fresh, stacked),
        }
        seconds = interleave({**solvers(weights), **delivered, **limits}, repeats)
        label = f"{name}, {count}{'' if count == layers else f' of {layers}'} x ({experts}, {dim})"
        speed.raw[label], bound.raw[label] = against, seconds
        speed.rows.append(
            [label, *(show_ms(against[key]) for key in ("literal", "svdvals", "exact", "power", "step"))]
            + [show_ratio(against, "literal", solver, 1) for solver in ("exact", "power", "step")]
        )
        bound.rows.append(
            [label, show_ms(seconds["limit"]), *(show_ratio(seconds, way, "limit", 1) for way in ("exact", "power", "step"))]
            + [show_ms(seconds["new"]), *(show_ratio(seconds, solver, "new", 1) for solver in ("exact", "power"))]
            + [peak(weights, call) for call in [*solvers(weights).values(), plain]]
        )
    return [speed, bound]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("penalty", __doc__, repeats=15).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
