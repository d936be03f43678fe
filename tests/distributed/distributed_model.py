"""A small MoE, a global batch, and the objective on it written out by hand in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_router import LoadBalanceLoss, SpectralRankPenalty
from spectral_router.functional import load_balance_loss, spectral_rank_penalty

DIM, ROWS, TOKENS, SIGMA = 6, 12, 5, 0.4
ALPHA, BETA = 0.3, 0.7


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        return x + sum(probs[..., [i]] * expert(x).tanh() for i, expert in enumerate(self.experts))


class Model(nn.Module):
    """`idle` is a block for another kind of token: its gate is found, but does not run."""

    def __init__(self, experts: Iterable[int] = (4, 3), mode: str = "none", with_loss: bool = True, idle: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode, self.with_loss = mode, with_loss
        self.into = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Block(num_experts) for num_experts in experts)
        self.head = nn.Linear(DIM, 1)
        self.idle = Block(4) if idle else None

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        h = self.into(x)
        for layer in self.layers:
            h = layer(h) if self.mode == "none" else checkpoint(layer, h, use_reentrant=self.mode == "reentrant")
        error = (self.head(h)[..., 0] - y).square().mean()
        return {"loss": error, "hidden": h} if self.with_loss else error


def batch(kind: str = "part") -> tuple[Tensor, Tensor, Tensor]:
    """The global batch. The ranks' shares differ in how many tokens count; in kind "none" the last has none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    x[: ROWS // 2] += 1.0  # so that the shares are routed differently
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[ROWS // 2 :, 2:] = 0
    if kind == "none":
        mask[ROWS // 2 :] = 0
    return x, torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64), mask


def share(rank: int, kind: str = "part", ranks: int = 2) -> tuple[Tensor, ...]:
    return tuple(tensor.chunk(ranks)[rank] for tensor in batch(kind))


def terms(sync: bool = True) -> dict[str, object]:
    """What the checks give to wrap_moe."""
    return {
        "penalty": SpectralRankPenalty(SIGMA),
        "balance": LoadBalanceLoss(sync=sync),
        "penalty_coef": ALPHA,
        "balance_coef": BETA,
    }


def by_hand(model: Model, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Equation 7 on one batch."""
    seen: list[Tensor] = []
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    hooks = [block.router.register_forward_hook(lambda _m, _a, out: seen.append(out.softmax(-1))) for block in blocks]
    output = model(x, y)
    for hook in hooks:
        hook.remove()
    loss = output["loss"] if model.with_loss else output
    loss = loss + ALPHA * sum(spectral_rank_penalty(block.router.weight, SIGMA) for block in blocks)
    return loss + BETA * sum(load_balance_loss(probs, mask) for probs in seen)


def expected(model: Model, kind: str = "part", sync: bool = True) -> dict[str, Tensor]:
    """Gradients in a single process: of the global batch, or, with `sync` off, of the mean over two ranks' shares."""
    model = copy.deepcopy(model)
    model.mode = "none"
    parts = [batch(kind)] if sync else [share(rank, kind) for rank in range(2)]
    torch.stack([by_hand(model, *part) for part in parts]).mean().backward()
    grads = gradients(model)
    model.zero_grad()
    task = model(*batch(kind)[:2])
    (task["loss"] if model.with_loss else task).backward()
    routers = [name for name in grads if "router" in name]
    assert all(distance(gradients(model), grads, [name]) > 0.1 for name in routers), "the term is too small to be seen"
    return grads


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the names of the bare model; zero where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = grad.detach().clone()
    return found


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor], names: Iterable[str] | None = None) -> float:
    """Largest relative error, in norm, of any parameter's gradient."""
    assert got.keys() == wanted.keys()
    names = wanted if names is None else names
    return max(((got[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-9)).item() for name in names)
