"""Models with no mixture of experts, each with something that looks like a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, seeded
from .parts import DIM, Attention, Block, Expert, Stack


class SwiGlu(nn.Module):
    """`gate_proj` has as many rows as a gate for 24 experts, and multiplies."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, hidden, bias=False)
        self.up_proj = nn.Linear(DIM, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class GatedAttention(nn.Module):
    """One sigmoid gate a head on the output of attention: `(heads, dim)`, the shape of a gate over eight experts."""

    def __init__(self, num_heads: int = 8) -> None:
        super().__init__()
        self.attention = Attention(DIM, num_heads)
        self.output_gate = nn.Linear(DIM, num_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.output_gate(x).sigmoid()
        return (self.attention(x).unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)


class GatedFusion(nn.Module):
    """Two branches blended, coordinate by coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([Expert(), Expert()])
        self.gate = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).sigmoid()
        return share * self.branches[0](x) + (1 - share) * self.branches[1](x)


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.gate(x))


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate on their mean over the tokens; the bottleneck has eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(DIM, 8)
        self.gate = nn.Linear(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(F.relu(self.squeeze(x.mean(1, keepdim=True)))).sigmoid()


class Highway(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).sigmoid()
        return share * F.relu(self.linear(x)) + (1 - share) * x


class Classifier(nn.Module):
    """As many classes as there are layers, all of one class: by shape alone the head is a gate over the layers."""

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block("mlp", Expert()) for _ in range(num_classes))
        self.norm = nn.LayerNorm(DIM)
        self.classifier = nn.Linear(DIM, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(self.norm(x).mean(1))
        labels = torch.arange(len(x), device=x.device)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def negative(name: str, make: Callable[[], nn.Module], dim: int = DIM) -> Case:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        return make(), {"x": torch.randn(2, 6, dim)}

    return Case(name, seeded(build), ())


def in_blocks(name: str, make: Callable[[], nn.Module]) -> Case:
    return negative(name, lambda: Stack("layers", [Block("mlp", make()) for _ in range(2)]))


NEGATIVES: tuple[Case, ...] = (
    in_blocks("swiglu", SwiGlu),
    in_blocks("lstm", lambda: Recurrent(nn.LSTM)),
    in_blocks("gru", lambda: Recurrent(nn.GRU)),
    in_blocks("gated_attention", GatedAttention),
    in_blocks("gated_fusion", GatedFusion),
    in_blocks("glu", Glu),
    in_blocks("squeeze_excite", SqueezeExcite),
    # as many layers as dimensions: each square gate has as many rows as the list beside it has entries
    negative("highway", lambda: Stack("layers", [Highway(8) for _ in range(8)]), dim=8),
    negative("classifier", Classifier),
)
