"""The model, its training and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor, nn

from examples.shared.figures import lanes
from examples.shared.palette import color
from spectral_router import functional, route, wrap_moe

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

FORMATS = tuple(sorted(Figure().canvas.get_supported_filetypes()))

DIM, EXPERTS, TOP_K, TOKENS = 32, 8, 2, 256
DEAD = 0.01  # of an even load
SHIFT = 2  # of all tokens, in units of a group's distance from the others
# label: what wrap_moe is told, and a marker, as colour alone tells few
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "no term": ({"penalty_coef": 0.0, "balance_coef": 0.0}, "s"),
    "penalty alone": ({"balance_coef": 0.0}, "^"),
    "both, the default": ({}, "o"),
}


class Mixture(nn.Module):
    """Linear experts behind a linear gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / DIM**0.5)
        self.num_experts = EXPERTS

    def forward(self, tokens: Tensor) -> Tensor:
        _, _, weights, indices = route(self.gate(tokens), TOP_K)
        every = torch.einsum("td,kdo->tko", tokens, self.experts)
        return torch.einsum("tko,tk->to", every.gather(1, indices[..., None].expand(-1, -1, DIM)), weights)


class Curve(NamedTuple):
    """What became of one gate: stable rank after every step, (steps + 1), and each expert's share of the assignments, (K)."""

    rank: Tensor
    share: Tensor


def train(seed: int, steps: int, options: dict[str, Any]) -> Curve:
    generator = torch.Generator().manual_seed(seed)
    shift = SHIFT * torch.randn(DIM, generator=generator)
    centers = shift + torch.randn(EXPERTS, DIM, generator=generator)
    maps = torch.randn(EXPERTS, DIM, DIM, generator=generator) / DIM**0.5

    def batch(count: int) -> tuple[Tensor, Tensor]:
        group = torch.randint(EXPERTS, (count,), generator=generator)
        tokens = centers[group] + torch.randn(count, DIM, generator=generator)
        return tokens, torch.einsum("td,tdo->to", tokens, maps[group])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mixture()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ranks = [functional.stable_rank(model.gate.weight).item()]
    with wrap_moe(model, gates="gate", **options) as handle:
        for _ in range(steps):
            tokens, wanted = batch(TOKENS)
            loss = nn.functional.mse_loss(model(tokens), wanted) + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ranks.append(functional.stable_rank(model.gate.weight).item())
    with torch.no_grad():
        chosen = route(model.gate(batch(4096)[0]), TOP_K).indices
    return Curve(torch.tensor(ranks), torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel())


def draw(curves: dict[str, list[Curve]]) -> Figure:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.2, 5.6), layout="constrained")
    for index, (label, of_seeds) in enumerate(curves.items()):
        marker, paint = ARMS[label][1], color(label)
        ranks = torch.stack([curve.rank for curve in of_seeds]).numpy()
        top.plot(ranks.T, color=paint, linewidth=0.6, alpha=0.5)
        every = max(1, ranks.shape[1] // 8)
        top.plot(ranks.mean(0), color=paint, linewidth=2, marker=marker, markevery=every, label=label)
        # sorted, as the experts of another seed have other numbers
        shares = EXPERTS * torch.stack([curve.share.sort(descending=True).values for curve in of_seeds]).numpy()
        place = (torch.arange(EXPERTS) + 1 + 0.27 * (index - 1)).numpy()
        bottom.bar(place, shares.mean(0), width=0.25, color=paint)
        for x, of_expert in zip(place, shares.T, strict=True):
            bottom.plot(x + lanes(of_expert, 0.2), of_expert, ".", markersize=3, color="black")
        told = f"{label}: an expert is dead in {dead(of_seeds)} of {len(of_seeds)} seeds"
        bottom.text(
            0.98, 0.94 - 0.09 * index, told, transform=bottom.transAxes, ha="right", va="top", color=paint, weight="bold"
        )
    top.axhline(EXPERTS, color="gray", linewidth=1, linestyle="--")
    top.set_title(f"Stable rank of the gate (at most {EXPERTS}): means, thin lines are seeds", fontsize=11)
    top.set(xlabel="step", ylim=(1, EXPERTS + 0.3))
    top.legend(fontsize=10, frameon=False, loc="lower right", ncols=3)
    bottom.axhline(1, color="gray", linewidth=1, linestyle="--")
    bottom.set_title("Load / even load at the end: bars are means, dots seeds", fontsize=11)
    bottom.set(xlabel="expert, from the busiest on", xticks=range(1, EXPERTS + 1), ylim=(0, 1.35 * bottom.get_ylim()[1]))
    return figure


def dead(of_seeds: list[Curve]) -> int:
    """In how many seeds an expert has less than 1 % of an even load."""
    return sum(bool(EXPERTS * curve.share.min() < DEAD) for curve in of_seeds)


def made(out: Path, seeds: int, steps: int) -> None:
    """Train, print what became of the gates, and draw it into `out`."""
    curves = {label: [train(seed, steps, arm) for seed in range(seeds)] for label, (arm, _) in ARMS.items()}
    for label, of_seeds in curves.items():
        rank = torch.stack([curve.rank[-1] for curve in of_seeds]).mean()
        least = EXPERTS * torch.stack([curve.share.min() for curve in of_seeds]).mean()
        print(
            f"{label:18} stable rank {rank:.2f}, least used expert {least:.2f} of an even load, "
            f"dead in {dead(of_seeds)} of {len(of_seeds)} seeds"
        )
    draw(curves).savefig(out, dpi=130)
