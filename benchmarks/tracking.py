"""Cheaper ways to follow the top direction of a gate in training, and what the penalty does under them.

    python -m benchmarks.tracking

The gradient needs only the top singular vector, and the weights move little in a step. So methods that read the weights
once or twice and start where they ended would cost next to the memory limit. Here each of them trains a gate with the
penalty as the only loss, and the exact penalty is the judge: a vector that lags reads sigma low and the stable rank high.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_router import SpectralRankPenalty
from spectral_router.functional import spectral_norm

from ._harness import Report, parser, progress, publish

# experts, dim, learning rate of Adam, steps
SETTINGS = {"large steps": (64, 512, 1e-3, 300), "small steps": (64, 512, 1e-4, 300)}


@dataclass
class Davidson:
    """Keeps `kept` approximate top vectors, adds the residuals of the best `added`, `rounds` times a step.

    Block Davidson without a preconditioner: with as many added as kept it is block Lanczos restarted in every step. Each
    round reads the weights twice, whatever the size of the block.
    """

    kept: int
    added: int
    rounds: int
    basis: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        rounds = self.rounds
        if self.basis is None:
            self.basis, rounds = torch.linalg.qr(torch.randn(len(weight), self.kept + self.added))[0], 30
        for _ in range(rounds):
            seen = self.basis.mT @ weight
            values, mixes = (part.flip(-1) for part in torch.linalg.eigh(seen @ seen.mT))
            best = self.basis @ mixes[:, : self.kept]
            image = weight @ (mixes[:, : self.added].mT @ seen).mT
            residual = image - best[:, : self.added] * values[: self.added]
            self.basis = torch.linalg.qr(torch.cat([best, residual / residual.norm(dim=0)], 1))[0]
        return best[:, 0]


@dataclass
class Subspace:
    """`kept` vectors multiplied with W W^T `rounds` times a step: with one of each, the power iteration of spectral norm."""

    kept: int
    rounds: int
    basis: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        rounds = self.rounds
        if self.basis is None:
            self.basis, rounds = torch.linalg.qr(torch.randn(len(weight), self.kept))[0], 30
        for _ in range(rounds):
            seen = self.basis.mT @ weight
            best = self.basis @ torch.linalg.eigh(seen @ seen.mT)[1][:, -1]
            self.basis = torch.linalg.qr(weight @ seen.mT)[0]
        return best


METHODS: dict[str, tuple[str, Callable[[], Callable[[Tensor], Tensor]]]] = {
    "1 vector, 1 power iteration": ("2", lambda: Subspace(1, 1)),
    "4 vectors, 1 iteration": ("2", lambda: Subspace(4, 1)),
    "8 vectors, 1 iteration": ("2", lambda: Subspace(8, 1)),
    "Davidson, 4 + 2 vectors": ("2", lambda: Davidson(4, 2, 1)),
    "Davidson, 8 + 8 vectors": ("2", lambda: Davidson(8, 8, 1)),
    "Davidson, 8 + 2 vectors, twice": ("4", lambda: Davidson(8, 2, 2)),
}


def surrogate(weight: Tensor, top: Tensor) -> Tensor:
    """The relative penalty with a given top vector: differentiating |W^T u| gives u v^T, so its gradient is the closed form."""
    sigma = (top @ weight).norm()
    rank = weight.square().sum() / sigma.square()
    return (sigma - 1).square() + (rank / len(weight) - 1).square()


def train(method: str, experts: int, dim: int, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """The exact penalty after training over that before it, and the largest relative error of sigma on the way."""
    torch.manual_seed(seed)
    weight = (torch.randn(experts, dim) * dim**-0.5).requires_grad_()
    judge, worst = SpectralRankPenalty(relative=True), 0.0
    before = judge([weight]).item()
    optimizer = torch.optim.Adam([weight], lr=rate)
    ours = SpectralRankPenalty(relative=True, solver="exact" if method == "exact" else "power")
    tracker = METHODS[method][1]() if method in METHODS else None
    for _ in range(steps):
        optimizer.zero_grad()
        if tracker is None:
            value = ours([weight])
            top = None if method == "exact" else ours.get_buffer("iterate_0")[0]
        else:
            top = tracker(weight.detach())
            value = surrogate(weight, top)
        if top is not None:
            with torch.no_grad():
                worst = max(worst, 1 - ((top @ weight).norm() / spectral_norm(weight)).item())
        value.backward()
        optimizer.step()
    return judge([weight]).item() / before, worst


def measure(repeats: int, quick: bool) -> list[Report]:
    columns = [f"{name}: {what}" for name in SETTINGS for what in ("penalty after / before", "sigma low by up to")]
    report = Report("Following the top direction in training", ["method", "reads of W a step", *columns])
    for method in ("exact", "power", *METHODS):
        cells = []
        for name, (experts, dim, rate, steps) in SETTINGS.items():
            progress(f"{method}, {name}")
            size = (16, 64, rate, 5) if quick else (experts, dim, rate, steps)
            runs = [train(method, *size, seed) for seed in range(1 if quick else repeats)]
            after, errors = zip(*runs, strict=True)
            report.raw[f"{method}, {name}"] = {"after": list(after), "error": list(errors)}
            cells += [f"{statistics.median(after):.4f} ({min(after):.4f} - {max(after):.4f})", f"{max(errors):.2%}"]
        reads = METHODS[method][0] if method in METHODS else "2 + Gram"
        report.rows.append([method, reads, *cells])
    for name, (experts, dim, rate, steps) in SETTINGS.items():
        report.notes.append(f"{name}: ({experts}, {dim}), Adam {rate:g}, {steps} steps, {repeats} seeds.")
    return [report]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("tracking", __doc__, repeats=3).parse_args(argv)
    publish(measure(arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
