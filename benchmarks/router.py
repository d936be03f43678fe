"""PrototypeRouter, forward + backward, against the linear gate and against `torch.cdist`, each with a softmax.

    python -m benchmarks.router

The gradient of the probs is given, and flows to the input and to the parameters, as in a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spectral_router import PrototypeRouter

from ._harness import Report, device, interleave, parser, progress, publish, show_ms, show_ratio

# tokens, dim, experts; the smallest last: by then the allocator keeps memory of that size, as it does in any longer run
SHAPES = [
    (65536, 128, 4),
    (16384, 512, 16),
    (32768, 1024, 8),
    (4096, 2048, 64),
    (16384, 2048, 64),
    (4096, 4096, 8),
    (4096, 4096, 256),
    (65536, 128, 256),
    (4096, 128, 4),
]
QUICK_SHAPES = [(64, 16, 4), (64, 32, 8)]


def step(gate: Callable[[Tensor], Tensor], inputs: Tensor, parameter: nn.Parameter, slope: Tensor) -> None:
    """As in training: gradients go to new memory, and are dropped after the step."""
    torch.autograd.grad(gate(inputs), (inputs, parameter), slope)


def linear(inputs: Tensor, weight: nn.Parameter) -> Tensor:
    return nn.functional.linear(inputs, weight).softmax(-1)


def cdist(inputs: Tensor, prototypes: nn.Parameter) -> Tensor:
    return (-torch.cdist(inputs, prototypes)).softmax(-1)


def ours(inputs: Tensor, router: PrototypeRouter) -> Tensor:
    return router(inputs).probs


def measure(repeats: int, quick: bool) -> list[Report]:
    report = Report(
        "PrototypeRouter, forward + backward",
        ["tokens x dim, experts", "linear, ms", "cdist, ms", "euclidean, ms", "sqeuclidean, ms",
         "sqeuclidean / linear", "euclidean / linear", "cdist / euclidean"],
    )  # fmt: skip
    for tokens, dim, experts in QUICK_SHAPES if quick else SHAPES:
        name = f"{tokens} x {dim}, {experts}"
        progress(name)
        torch.manual_seed(0)
        inputs = torch.randn(tokens, dim, device=device(), requires_grad=True)
        slope = torch.randn(tokens, experts, device=device())
        routers = {
            metric: PrototypeRouter(dim, experts, metric=metric, device=device()) for metric in ("euclidean", "sqeuclidean")
        }
        weight = routers["euclidean"].prototypes
        gates: dict[str, tuple[Callable[[Tensor], Tensor], nn.Parameter]] = {
            "linear": (partial(linear, weight=weight), weight),
            "cdist": (partial(cdist, prototypes=weight), weight),
            **{metric: (partial(ours, router=router), router.prototypes) for metric, router in routers.items()},
        }
        calls: dict[str, Callable[[], object]] = {
            key: partial(step, gate, inputs, parameter, slope) for key, (gate, parameter) in gates.items()
        }
        # calls of a millisecond vary more and cost little to repeat
        seconds = interleave(calls, repeats if quick or tokens * dim > 2**20 else 10 * repeats)
        report.raw[name] = seconds
        report.rows.append(
            [name]
            + [show_ms(seconds[key]) for key in calls]
            + [show_ratio(seconds, "sqeuclidean", "linear"), show_ratio(seconds, "euclidean", "linear")]
            + [show_ratio(seconds, "cdist", "euclidean")]
        )
    return [report]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("router", __doc__, repeats=9).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
