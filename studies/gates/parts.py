"""The parts that the hand-written models share: blocks, experts, and the arithmetic of combining experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, ExpectedGate, ReadProbs, seeded

DIM, EXPERTS, TOP_K = 16, 8, 2


class Recorder(nn.Module):
    """A module that keeps the full routing probabilities of its last forward pass."""

    true_probs: Tensor

    def __getstate__(self) -> dict[str, Any]:
        # a tensor inside a graph cannot be deep-copied
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, Tensor)}


class Expert(nn.Module):
    def __init__(self, dim: int = DIM, hidden: int = 24) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GroupedExperts(nn.Module):
    """All experts in three-dimensional parameters; `(tokens, dim)` -> `(experts, tokens, dim)`."""

    def __init__(self, num_experts: int = EXPERTS, dim: int = DIM, hidden: int = 24) -> None:
        super().__init__()
        self.w1 = matrix(num_experts, dim, hidden)
        self.w2 = matrix(num_experts, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1) @ self.w2


class Attention(nn.Module):
    def __init__(self, dim: int = DIM, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; the feed-forward part is called `slot` and may return a tuple."""

    def __init__(self, slot: str, feed_forward: nn.Module, dim: int = DIM) -> None:
        super().__init__()
        self.slot = slot
        self.attn_norm = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.add_module(slot, feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out = getattr(self, self.slot)(self.ffn_norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


class Stack(nn.Module):
    """Blocks that run one after the other, under a given path such as "decoder.layers"."""

    def __init__(self, path: str, blocks: Iterable[nn.Module], container: Callable[..., nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        self.path = path
        parent: nn.Module = self
        *outer, leaf = path.split(".")
        for name in outer:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        blocks = list(blocks)
        if container is nn.ModuleDict:
            parent.add_module(leaf, nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}))
        else:
            parent.add_module(leaf, nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.get_submodule(self.path).children():
            x = block(x)
        return {"loss": x.square().mean(), "output": x}


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * DIM**-0.5)


def experts(num_experts: int = EXPERTS, dim: int = DIM) -> nn.ModuleList:
    return nn.ModuleList(Expert(dim) for _ in range(num_experts))


def run_all(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """`(experts, tokens, dim)`: every expert on every token. Slow, but no routing rule is hidden in it."""
    return torch.stack([module(x) for module in modules])


def mix(outputs: Tensor, combine: Tensor) -> Tensor:
    """`(experts, tokens, dim)` weighted by `(tokens, experts)`."""
    return torch.einsum("end,ne->nd", outputs, combine)


def spread(weights: Tensor, indices: Tensor, num_experts: int = EXPERTS) -> Tensor:
    """Weights `(tokens, top_k)` at their experts' places, zero elsewhere: `(tokens, experts)`."""
    return weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, indices, weights)


def top_share(probs: Tensor, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each token, renormalised, and their experts."""
    weights, indices = probs.topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), indices


def recorded(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """Reads what a `Recorder` kept."""
    assert isinstance(module, Recorder)
    return module.true_probs


def stack_case(
    name: str,
    make: Callable[[], nn.Module],
    gates: str | dict[str, str],
    *,
    num_experts: int = EXPERTS,
    scoring: str = "softmax",
    path: str = "layers",
    slot: str = "mlp",
    dim: int = DIM,
    container: Callable[..., nn.Module] = nn.ModuleList,
    read: ReadProbs = recorded,
) -> Case:
    """Two blocks, each with a feed-forward part from `make`. `gates`: parameter -> recording module, from that part on.

    A plain string is the parameter of a gate that the part itself records.
    """
    gates = {gates: ""} if isinstance(gates, str) else gates

    def build() -> tuple[nn.Module, dict[str, Any]]:
        blocks = [Block(slot, make(), dim) for _ in range(2)]
        return Stack(path, blocks, container), {"x": torch.randn(2, 6, dim)}

    expected = tuple(
        ExpectedGate(f"{part}.{parameter}", num_experts, scoring, f"{part}.{module}".rstrip("."), read)
        for part in (f"{path}.{layer}.{slot}" for layer in range(2))
        for parameter, module in gates.items()
    )
    return Case(name, seeded(build), expected)
