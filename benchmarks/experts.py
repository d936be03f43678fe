"""The example's batched experts against a loop over modules, and its whole training step against a dense network's.

    python -m benchmarks.experts

Equal width: routing is soft, so every expert computes every image, and K experts of hidden width h do the multiplications of
one MLP of hidden width K h. The dense network has that MLP where the other has router and experts; stem, the linear layer
before each mixture, head, optimiser and batch are the same. Both then do the same work but for the routers (1/2h of an MLP's
multiplications): what the ratio shows over one is what routing itself costs, penalty and balance loss included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, to_layout
from examples.image_classification.model import Experts, SRMoE, mixed_precision
from examples.image_classification.objective import Objective
from examples.image_classification.train import build

from ._harness import Report, device, interleave, parser, progress, publish, show_ms, show_ratio

CHANNELS, PIXELS, CLASSES = 1, 28, 4  # the example's default images
DENSE = "dense"


class Loop(nn.Module):
    """The same experts as modules of their own, run one after the other."""

    def __init__(self, batched: Experts) -> None:
        super().__init__()
        count, dim, hidden = batched.w_in.shape
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(count)
        )
        with torch.no_grad():
            for index, expert in enumerate(self.experts):
                own = (batched.w_in[index].mT, batched.b_in[index, 0], batched.w_out[index].mT, batched.b_out[index, 0])
                for parameter, value in zip(expert.parameters(), own, strict=True):
                    parameter.copy_(value)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        outputs = (expert(x) * weights[:, index, None] for index, expert in enumerate(self.experts))
        total = next(outputs)
        for output in outputs:
            total = total + output
        return total


def run(experts: nn.Module, x: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """Forward and backward, to the input and the routing weights too, as between two layers."""
    experts.zero_grad(set_to_none=True)
    x.grad = weights.grad = None
    output: Tensor = experts(x, weights)
    output.backward(gradient)
    return output.detach()


def agree(batched: Experts, loop: Loop, x: Tensor, weights: Tensor, gradient: Tensor) -> None:
    """Both compute one thing, or their times say nothing."""
    found = []
    for experts in (batched, loop):
        output = run(experts, x, weights, gradient)
        assert x.grad is not None
        assert weights.grad is not None
        found.append((output, x.grad, weights.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Dense(nn.Module):
    """The network with an MLP in place of each router and its experts. Without `processor` not even the layer before it."""

    def __init__(self, model: SRMoE, config: Config, processor: bool = True) -> None:
        super().__init__()
        wide = config.experts * config.hidden
        layers: list[nn.Module] = []
        for layer in model.moe_layers:
            layers += [layer.processor] if processor else []
            layers += [nn.Linear(config.dim, wide), nn.ReLU(), nn.Linear(wide, config.dim)]
        self.network = nn.Sequential(model.stem, *layers, model.head)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def objective_of(model: SRMoE, objective: Objective, parts: Sequence[str], images: Tensor, labels: Tensor) -> Tensor:
    """Equation 7; or, to see what a term costs, only some of its terms."""
    logits, routed = model(images)
    if len(parts) == 2:
        return objective(model, logits, routed, labels).total
    total = F.cross_entropy(logits.float(), labels)
    if "balance" in parts:
        total = total + objective.beta * torch.stack([objective.balance(output.probs) for output in routed]).sum()
    return total


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """The example's training step."""
    with mixed_precision(device()):
        value = loss()
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()


def network(config: Config, images: Tensor, labels: Tensor) -> tuple[SRMoE, Objective]:
    data = ImageSet(images, labels, [str(label) for label in range(CLASSES)], [], "none")
    model, objective = build(config, "spectral", 0, data, images.device)
    return model.train(), objective


def steps(config: Config, images: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """A training step of each kind of network, each with its own weights and optimiser."""
    calls: dict[str, Callable[[], object]] = {}
    for name, parts in (
        ("whole", ("penalty", "balance")),
        ("no penalty", ("balance",)),
        ("task loss only", ()),
    ):
        model, objective = network(config, images, labels)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        calls[name] = partial(step, partial(objective_of, model, objective, parts, images, labels), optimizer)
    for name, processor in ((DENSE, True), ("dense, no layer before", False)):
        dense = Dense(network(config, images, labels)[0], config, processor).to(images.device)
        optimizer = torch.optim.Adam(dense.parameters(), lr=config.lr, fused=True)
        calls[name] = partial(step, partial(dense_loss, dense, images, labels), optimizer)
    return calls


def dense_loss(dense: Dense, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(dense(images).float(), labels)


def measure(repeats: int, quick: bool) -> list[Report]:
    config = Config()
    alone = Report("Experts, forward + backward", ["experts", "batched, ms", "loop, ms", "loop / batched"])
    for count in (2, 4) if quick else (2, 4, 16, 64):
        progress(f"{count} experts")
        torch.manual_seed(0)
        batched = Experts(count, config.dim, config.hidden).to(device())
        loop = Loop(batched).to(device())
        x = torch.randn(config.batch_size, config.dim, device=device(), requires_grad=True)
        weights = torch.randn(config.batch_size, count, device=device()).softmax(-1).requires_grad_()
        gradient = torch.randn(config.batch_size, config.dim, device=device())
        agree(batched, loop, x, weights, gradient)
        seconds = interleave(
            {"batched": partial(run, batched, x, weights, gradient), "loop": partial(run, loop, x, weights, gradient)}, repeats
        )
        alone.raw[str(count)] = seconds
        alone.rows.append(
            [str(count), show_ms(seconds["batched"]), show_ms(seconds["loop"]), show_ratio(seconds, "loop", "batched")]
        )
    alone.notes = [
        f"{config.batch_size} images, width {config.dim}, hidden width {config.hidden}; outputs and gradients agree."
    ]
    whole = Report("Training step, against a dense network of equal width", ["layers x experts", "step", "ms", "step / dense"])
    for layers, experts in ((2, 2),) if quick else ((2, 2), (4, 4)):
        progress(f"training step, {layers} x {experts}")
        config = Config(layers=layers, experts=experts)
        generator = torch.Generator().manual_seed(0)
        images = to_layout(torch.rand(config.batch_size, CHANNELS, PIXELS, PIXELS, generator=generator).to(device()))
        labels = torch.randint(CLASSES, (config.batch_size,), generator=generator).to(device())
        seconds = interleave(steps(config, images, labels), repeats)
        whole.raw[f"{layers}x{experts}"] = seconds
        whole.rows += [
            [f"{layers} x {experts}", name, show_ms(times), show_ratio(seconds, name, DENSE)] for name, times in seconds.items()
        ]
    whole.notes = [
        "A step is forward, loss, backward and Adam. Dense: an MLP of all experts' width together in place of each router "
        "and its experts."
    ]
    return [alone, whole]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("experts", __doc__, repeats=100).parse_args(argv)
    publish(measure(3 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
