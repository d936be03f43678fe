"""Styles of gates from papers and repositories, under names that say nothing: one real forward reads each exactly.

Each model keeps in `seen` the probabilities that it routed by, one tensor a call of a gate, in the order of the calls.
"""

import pytest
import torch
import torch.nn.functional as F
from test_observed import word
from torch import Tensor, nn

from spectral_router import find_gates, wrap_moe

DIM, EXPERTS = 16, 4


def experts(count: int = EXPERTS) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(count))


def mix(weights: Tensor, parts: nn.ModuleList, x: Tensor) -> Tensor:
    return sum(weights[..., i, None] * part(x) for i, part in enumerate(parts))


class Style(nn.Module):
    """`a`, `b` and so on are children under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.parts = experts()
        self.rename("parts", 0)

    def rename(self, name: str, seed: int) -> None:
        child = getattr(self, name)
        delattr(self, name)
        self.__dict__.setdefault("names", {})[name] = word(seed)
        if isinstance(child, nn.Parameter):
            self.register_parameter(word(seed), child)
        else:
            self.add_module(word(seed), child)

    def get(self, name: str) -> nn.Module | nn.Parameter:
        return getattr(self, self.names[name])

    def note(self, probs: Tensor) -> Tensor:
        self.seen.append(probs.detach().reshape(-1, probs.shape[-1]))
        return probs


class MMoE(Style):
    """Ma et al. 2018: a gate a task, here with batch norm before the softmax, over shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Sequential(nn.Linear(DIM, EXPERTS), nn.BatchNorm1d(EXPERTS)) for _ in range(2))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(mix(self.note(gate(x).softmax(-1)), self.get("parts"), x) for gate in self.get("a"))


class PLE(Style):
    """Tang et al. 2020: levels of gates, a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.ModuleList(nn.Linear(DIM, EXPERTS, bias=False) for _ in range(2)) for _ in range(2))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        for level in self.get("a"):
            x = sum(mix(self.note(gate(x).softmax(-1)), self.get("parts"), x) for gate in level)
        return x


class Noisy(Style):
    """Shazeer et al. 2017: noise of a learned width, two raw matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(DIM, EXPERTS) / 4) for _ in range(2))
        self.rename("a", 1)
        self.rename("b", 2)

    def forward(self, x: Tensor) -> Tensor:
        clean = x @ self.get("a")
        noisy = clean + torch.randn_like(clean) * (F.softplus(x @ self.get("b")) + 1e-2)
        top, chosen = noisy.topk(2, -1)
        weights = torch.zeros_like(noisy).scatter(-1, chosen, top.softmax(-1))
        self.note(clean.softmax(-1))  # what is read is without the noise
        return mix(weights, self.get("parts"), x)


class CosineProjected(Style):
    """Chi et al. 2022: cosines of projected tokens, over a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 8, bias=False), nn.Parameter(torch.randn(8, EXPERTS))
        self.c = nn.Parameter(torch.tensor(2.0))
        for seed, name in enumerate("abc", 1):
            self.rename(name, seed)

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.normalize(self.get("a")(x), dim=-1) @ F.normalize(self.get("b"), dim=0)
        return mix(self.note((cosines * self.get("c").exp()).softmax(-1)), self.get("parts"), x)


class Sinkhorn(Style):
    """Clark et al. 2022: balanced assignment for the choice, softmax for the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS, bias=False)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.get("a")(x)
        with torch.no_grad():
            plan = logits.exp()
            for _ in range(3):
                plan = plan / plan.sum(0, keepdim=True)
                plan = plan / plan.sum(1, keepdim=True)
            chosen = plan.argmax(-1, keepdim=True)
        probs = self.note(logits.softmax(-1))
        return mix(torch.zeros_like(probs).scatter(-1, chosen, probs.gather(-1, chosen)), self.get("parts"), x)


class ExpertChoice(Style):
    """Zhou et al. 2022: experts choose tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(DIM, EXPERTS) / 4)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.note((x @ self.get("a")).softmax(-1))
        weight, token = scores.mT.topk(len(x) // 2, -1)
        out = torch.zeros_like(x)
        for i, part in enumerate(self.get("parts")):
            out = out.index_add(0, token[i], weight[i, :, None] * part(x[token[i]]))
        return out


class SwitchHead(Style):
    """Csordás et al. 2024: sigmoid gates choose the value projections of attention heads, from stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, EXPERTS, bias=False), nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 4)
        self.q, self.k = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.rename("a", 1)
        self.rename("b", 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.get("a")(x).sigmoid()
        self.note(scores / scores.sum(-1, keepdim=True))
        weight, chosen = scores.topk(2, -1)
        value = torch.einsum("nd,nkde,nk->ne", x, self.get("b")[chosen], weight)
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ value


class LoRAMoE(Style):
    """Dou et al. 2024: experts are low-rank additions to one frozen layer, two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.base = nn.Linear(DIM, EXPERTS, bias=False), nn.Linear(DIM, DIM)
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, 2) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2, DIM) / 4)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.note(self.get("a")(x).softmax(-1))
        return self.base(x) + torch.einsum("nd,edr,erf,ne->nf", x, self.down, self.up, probs)


class OneGateForAll(Style):
    """One gate chooses for several layers of experts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS)
        self.more = nn.ModuleList(experts() for _ in range(2))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.note(self.get("a")(x).softmax(-1))
        for layer in self.more:
            x = mix(probs, layer, x).tanh()
        return x


class Shared(Style):
    """One gate, called once in each of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS)
        self.more = nn.ModuleList(experts() for _ in range(2))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.more:
            x = mix(self.note(self.get("a")(x).softmax(-1)), layer, x).tanh()
        return x


class BiasedChoice(Style):
    """Wang et al. 2024: sigmoid scores, a bias on the choice alone, in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(EXPERTS, DIM) / 4)
        self.register_buffer("shift", torch.randn(EXPERTS))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.get("a").float()).sigmoid()
        chosen = (scores + self.shift).topk(2, -1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        self.note(scores / scores.sum(-1, keepdim=True))
        return mix(torch.zeros_like(scores).scatter(-1, chosen, weights), self.get("parts"), x)


class Deep(Style):
    """A router of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, EXPERTS))
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        return mix(self.note(self.get("a")(x).softmax(-1)), self.get("parts"), x)


class Pooled(Style):
    """One choice a sequence, from the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(0, (-1, 4))
        probs = self.note(self.get("a")(tokens.mean(1)).softmax(-1))
        return mix(probs[:, None].expand(-1, 4, -1), self.get("parts"), tokens).flatten(0, 1)


STYLES = [
    MMoE,
    PLE,
    Noisy,
    CosineProjected,
    Sinkhorn,
    ExpertChoice,
    SwitchHead,
    LoRAMoE,
    OneGateForAll,
    Shared,
    BiasedChoice,
    Deep,
    Pooled,
]


@pytest.mark.parametrize("kind", STYLES)
def test_read_exactly_under_any_name(kind: type[Style]) -> None:
    """What is read is what routed, call by call."""
    torch.manual_seed(0)
    model, x = kind(), torch.randn(32, DIM)
    model(x)
    calls = len(model.seen)
    handle = wrap_moe(model, example=x, penalty=None)
    model.train()(x)
    handle.loss()
    read: list[Tensor] = []
    handle.balance = lambda probs, mask: read.append(probs.detach().reshape(-1, EXPERTS)) or probs.sum()
    model.seen.clear()
    model(torch.randn(24, DIM))
    handle.loss()
    assert len(read) == calls
    for probs, truth in zip(sorted(read, key=_order), sorted(model.seen, key=_order), strict=True):
        torch.testing.assert_close(probs, truth, atol=1e-5, rtol=0)


def _order(probs: Tensor) -> float:
    return probs[0].double().dot(torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)).item()


def test_one_output_for_each_token_is_no_gate() -> None:
    """Mixture of depths chooses among tokens."""

    class MoD(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.block = nn.Linear(DIM, 1), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.score(x)[:, 0].topk(len(x) // 2)
            return x.index_add(0, chosen, weight.sigmoid()[:, None] * self.block(x[chosen]))

    assert find_gates(MoD(), example=torch.randn(16, DIM)) == []
