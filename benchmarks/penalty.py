"""The spectral penalty over all gates of a model, forward + backward, against the literal formula and the memory limit.

    python -m benchmarks.penalty

The limit is what any method must do at least: read every weight twice and write every gradient once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty

from ._harness import Report, device, interleave, parser, peak_bytes, progress, publish, ratio, show_ms, show_ratio

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
    total.backward()  # type: ignore[no-untyped-call]


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
    """The same with new memory for the gradient, which is what autograd hands out. On a CPU the pages cost more than the write."""
    stacked.sum()
    stacked.sum()
    torch.full_like(stacked, 1.0)


def gates(count: int, experts: int, dim: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(experts, dim, device=device()) * dim**-0.5) for _ in range(count)]


def measure(repeats: int, quick: bool) -> list[Report]:
    speed = Report(
        "Penalty, forward + backward",
        ["gates", "literal, ms", "svdvals, ms", "exact, ms", "power, ms", "literal / exact", "svdvals / exact",
         "exact / limit", "power / limit", "exact / limit, new memory", "power / limit, new memory", "extra memory / weights, exact", "power"],
    )  # fmt: skip
    for name, (layers, experts, dim, count) in MODELS.items():
        progress(name)
        if quick:
            experts, dim, count = min(experts, 16), 64, 3
        weights = gates(count, experts, dim)
        stacked = torch.stack([weight.detach() for weight in weights])
        penalties = {
            solver: SpectralRankPenalty(relative=True, solver=solver)  # type: ignore[arg-type]
            for solver in ("exact", "power")
        }
        quickly: dict[str, Callable[[], object]] = {
            solver: partial(fresh, weights, partial(ours, penalty=penalty)) for solver, penalty in penalties.items()
        }
        quickly |= {
            "limit": partial(limit, stacked, torch.empty_like(stacked)),
            "limit, new memory": partial(limit_fresh, stacked),
        }
        slowly: dict[str, Callable[[], object]] = {
            "exact": quickly["exact"],
            "literal": partial(fresh, weights, partial(literal, norm=lambda w: torch.linalg.matrix_norm(w, 2))),
            "svdvals": partial(fresh, weights, partial(literal, norm=lambda w: torch.linalg.svdvals(w)[0])),
        }
        seconds = interleave(quickly, repeats)
        # the literal formula takes seconds at the largest shapes; there its spread is small, too
        rounds = repeats if statistics.median(interleave({"literal": slowly["literal"]}, 1)["literal"]) < 0.2 else 3
        against = interleave(slowly, min(rounds, repeats))
        size = stacked.numel() * stacked.element_size()
        extra = {solver: peak_bytes(quickly[solver]) - size for solver in penalties}
        speed.raw[name] = {**{f"literal round: {key}": value for key, value in against.items()}, **seconds}
        of = "" if count == layers else f" of {layers}"
        speed.rows.append(
            [f"{name}, {count}{of} x ({experts}, {dim})"]
            + [show_ms(part) for part in (against["literal"], against["svdvals"], seconds["exact"], seconds["power"])]
            + [show_ratio(against, "literal", "exact", 1), show_ratio(against, "svdvals", "exact", 1)]
            + [show_ratio(seconds, solver, base, 1) for base in ("limit", "limit, new memory") for solver in penalties]
            + [f"{extra[solver] / size:.2f}" for solver in penalties]
        )
    growth = Report(
        "Penalty, cost in the number of gates",
        ["gates of (64, 2048)", "exact, ms", "power, ms", "exact, ms a gate", "power, ms a gate"],
    )
    for count in (2, 4) if quick else (2, 8, 32, 128):
        progress(f"{count} gates")
        weights = gates(count, 64, 256 if quick else 2048)
        calls: dict[str, Callable[[], object]] = {
            solver: partial(fresh, weights, partial(ours, penalty=SpectralRankPenalty(relative=True, solver=solver)))  # type: ignore[arg-type]
            for solver in ("exact", "power")
        }
        seconds = interleave(calls, repeats)
        growth.raw[str(count)] = seconds
        cost = [statistics.median(seconds[solver]) * 1e3 for solver in calls]
        growth.rows.append([str(count), *(f"{ms:.2f}" for ms in cost), *(f"{ms / count:.3f}" for ms in cost)])
    return [speed, growth]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("penalty", __doc__, repeats=15).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
