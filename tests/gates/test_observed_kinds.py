"""More kinds of gates, and of what is none: those on which real repositories were once misread, in our own words.

As in `test_observed_styles`, names say nothing, and `seen` holds the probabilities that were routed by, without noise.
"""

import pytest
import torch
import torch.nn.functional as F
from test_observed_styles import DIM, EXPERTS, Style, mix
from torch import Tensor, nn

from spectral_router import find_gates, wrap_moe


class NoiseByModules(Style):
    """Noise of a learned width; softmax and softplus are modules, so that what they are given has the noise in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(DIM, EXPERTS) / 4) for _ in range(2))
        self.rename("a", 1)
        self.rename("b", 2)
        self.soft, self.plus = nn.Softmax(-1), nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        clean = x @ self.get("a")
        self.note(clean.softmax(-1))
        probs = self.soft(clean + torch.randn_like(clean) * (self.plus(x @ self.get("b")) + 1e-2))
        weights, chosen = probs.topk(2, -1)
        return mix(torch.zeros_like(probs).scatter(-1, chosen, weights), self.get("parts"), x)


class MixedScores(Style):
    """Noisy scores of a small network, times a K x K matrix that is the identity when fresh."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, EXPERTS, bias=False))
        self.b = nn.Parameter(torch.eye(EXPERTS) + torch.randn(EXPERTS, EXPERTS) / 4)
        self.rename("a", 1)
        self.rename("b", 2)
        self.soft = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        clean = self.get("a")(x)
        self.note((clean @ self.get("b")).softmax(-1))
        return mix(self.soft((clean + torch.randn_like(clean)) @ self.get("b")), self.get("parts"), x)


class OverTwoLists(Style):
    """Tang et al. 2020: each task has experts of its own, in lists of lists, and shares others."""

    def __init__(self) -> None:
        super().__init__()
        self.parts_own = nn.ModuleList(nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2)) for _ in range(2))
        self.a = nn.ModuleList(nn.Sequential(nn.Linear(DIM, 2 + EXPERTS), nn.Softmax(-1)) for _ in range(2))
        self.b = nn.Linear(DIM, 4 + EXPERTS)
        for seed, name in enumerate(("parts_own", "a", "b"), 1):
            self.rename(name, seed)

    def forward(self, x: Tensor) -> Tensor:
        shared = [part(x) for part in self.get("parts")]
        own = [[part(x) for part in group] for group in self.get("parts_own")]
        out = []
        for gate, outputs in zip(self.get("a"), own, strict=True):
            out.append(self.note(gate(x))[:, None] @ torch.stack([*outputs, *shared], 1))
        everything = torch.stack([*own[0], *own[1], *shared], 1)
        out.append(self.note(self.get("b")(x).softmax(-1))[:, None] @ everything)
        return torch.cat(out, -1)


class NumberedAttributes(Style):
    """Dou et al. 2024: the experts' two halves are attributes with a number, beside the frozen layer and the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a = nn.Linear(DIM, DIM), nn.Linear(DIM, EXPERTS, bias=False)
        self.rename("a", 1)
        for i in range(EXPERTS):
            self.add_module(f"down{i}", nn.Linear(DIM, 2, bias=False))
            self.add_module(f"up{i}", nn.Linear(2, DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        probs, out = self.note(self.get("a")(x).softmax(-1)), self.base(x)
        for i in range(EXPERTS):
            out = out + probs[:, i, None] * self.get_submodule(f"up{i}")(self.get_submodule(f"down{i}")(x)) * 2.0
        return out


class HeadsTimesExperts(Style):
    """Csordás et al. 2024: rows are heads x experts, and so are the slices of the stack; each head chooses on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2 * EXPERTS, DIM) / 4)
        self.b = nn.Parameter(torch.randn(2 * EXPERTS, DIM, DIM) / 4)
        self.rename("a", 1)
        self.rename("b", 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.get("a")).unflatten(-1, (2, EXPERTS)).sigmoid()
        self.note(scores / scores.sum(-1, keepdim=True))
        chosen = scores.detach().topk(2, -1).indices
        values = self.get("b")[chosen + EXPERTS * torch.arange(2)[:, None]]
        return torch.einsum("nd,nhkde,nhk->ne", x, values, scores.gather(-1, chosen))


class RenormedInPlace(Style):
    """Rows that each forward brings back to one length, on reduced tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 8, bias=False), nn.Parameter(torch.randn(EXPERTS, 8))
        self.rename("a", 1)
        self.rename("b", 2)

    def forward(self, x: Tensor) -> Tensor:
        reduced, places = self.get("a")(x), self.get("b")
        with torch.no_grad():
            places.mul_(1.5 / places.norm(dim=1, keepdim=True))
        best, chosen = (reduced @ places.mT).topk(2, -1)
        self.note((reduced @ places.mT).softmax(-1))
        return mix(torch.zeros(len(x), EXPERTS).scatter(-1, chosen, best.softmax(-1)), self.get("parts"), x)


class WrittenOut(Style):
    """Softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(DIM, EXPERTS) / 4)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.normalize(x, dim=-1) @ F.normalize(self.get("a"), dim=0)
        exp = (logits - logits.amax(-1, keepdim=True)).exp()
        return mix(self.note(exp / exp.sum(-1, keepdim=True)), self.get("parts"), x)


class Gumbel(Style):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.get("a")(x)
        self.note((logits / 0.7).softmax(-1))
        return mix(F.gumbel_softmax(logits, tau=0.7), self.get("parts"), x)


class NoiseInPlace(Style):
    """Noise is added to the very tensor that the layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, EXPERTS)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        score = self.get("a")(x)
        self.note(score.softmax(-1))
        score += torch.rand_like(score) * 0.2 + 0.9
        return mix(score.softmax(-1), self.get("parts"), x)


class BehindDropout(Style):
    """What is scored is random as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.a = nn.Linear(DIM, DIM), nn.Parameter(torch.randn(DIM, EXPERTS) / 4)
        self.rename("a", 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.inward(x), 0.3, self.training)
        clean = F.layer_norm(x, (DIM,)) @ self.get("a")
        self.note(clean.softmax(-1))
        return mix((clean + torch.randn_like(clean)).softmax(-1), self.get("parts"), x)


KINDS = [
    NoiseByModules,
    MixedScores,
    OverTwoLists,
    NumberedAttributes,
    HeadsTimesExperts,
    RenormedInPlace,
    WrittenOut,
    Gumbel,
    NoiseInPlace,
]


@pytest.mark.parametrize("kind", KINDS)
def test_read_exactly_under_any_name(kind: type[Style]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(32, DIM)
    handle = wrap_moe(model, example=x, penalty=None)
    read: list[Tensor] = []
    handle.balance = lambda probs, mask: read.append(probs.detach().reshape(-1, probs.shape[-1])) or probs.sum()
    for size in (32, 24):
        read.clear()
        model.seen.clear()
        model(torch.randn(size, DIM))
        handle.loss().backward()
        assert len(read) == len(model.seen)
        for probs, truth in zip(sorted(read, key=_order), sorted(model.seen, key=_order), strict=True):
            torch.testing.assert_close(probs, truth, atol=1e-5, rtol=0)


def _order(probs: Tensor) -> tuple[int, float]:
    numbers = torch.arange(1.0, probs.shape[-1] + 1, dtype=torch.float64)
    return probs.shape[-1], (probs.double() @ numbers).mean().item()


def test_what_is_seen_and_cannot_be_read_is_told() -> None:
    """Dropout in the block's own forward: no module is given or gives the tokens that were scored."""
    with pytest.warns(UserWarning, match=r"\w+ scores 4 experts, but the scores cannot be had again from.*write gates=Gate\("):
        assert find_gates(BehindDropout(), example=torch.randn(32, DIM)) == []


class ProductKeys(nn.Module):
    """Lample et al. 2019: two sets of keys, whose pairs choose rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(DIM, 2 * DIM), nn.Parameter(torch.randn(2, EXPERTS, DIM))
        self.table = nn.Embedding(EXPERTS**2, DIM)

    def forward(self, x: Tensor) -> Tensor:
        scores, keys = torch.einsum("nsd,skd->snk", self.queries(x).unflatten(-1, (2, DIM)), self.keys).topk(2, -1)
        weights, best = (scores[0, :, :, None] + scores[1, :, None]).flatten(1).topk(2, -1)
        pairs = (keys[0, :, :, None] * EXPERTS + keys[1, :, None]).flatten(1).gather(-1, best)
        return (weights.softmax(-1)[..., None] * self.table(pairs)).sum(1)


def test_keys_whose_pairs_are_the_experts_are_told() -> None:
    with pytest.warns(
        UserWarning, match=r"^keys scores 4 keys whose pairs are the experts \(product keys\).*write gates=Gate\("
    ):
        assert find_gates(ProductKeys(), example=torch.randn(32, DIM)) == []


class HalfNamed(nn.Module):
    """One gate has a name that tells, the others have none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))
        self.gate, self.pick = nn.Linear(DIM, EXPERTS), nn.Linear(DIM, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return mix(self.gate(x).softmax(-1), self.experts, x) + mix(self.pick(x).softmax(-1), self.experts, x)


def test_gates_that_names_missed_are_named_in_the_first_forward() -> None:
    model, x = HalfNamed(), torch.randn(32, DIM)
    wrap_moe(model)
    with pytest.warns(
        UserWarning, match=r"more gates than were found: pick\.weight \(4 experts\); nothing is added.*example=batch"
    ):
        model(x)


@pytest.mark.parametrize("how", [{"example": torch.randn(32, DIM)}, {"gates": "gate"}, {"exclude": "pick"}])
def test_nothing_is_said_where_the_caller_chose_or_all_are_found(how: dict) -> None:
    model = HalfNamed()
    if "exclude" in how:
        how = {"exclude": "gate", "gates": ["gate", "pick"]}
    handle = wrap_moe(model, **how)
    model(torch.randn(32, DIM))
    handle.loss()
    assert len(handle.gates) == (2 if "example" in how else 1)


# ------------------------------------------------------------------------------------------------------------ what is no gate


class SqueezeExcite(nn.Module):
    """As many layers, all alike, as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.gate = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 4)
        self.inward = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for layer in self.layers:
            x = layer(x * self.gate(x).sigmoid()).relu()
        return x


class TwoHeads(nn.Module):
    """A sigmoid a head scales keys and values, which are made by two alike layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.beta = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        beta = self.beta(x).sigmoid()[..., None]
        q, k, v = (layer(x).unflatten(-1, (2, -1)) for layer in (self.q, self.k, self.v))
        return torch.einsum("nhd,mhd,mhe->nhe", q, k * beta, v * beta).flatten(-2)


class Streams(nn.Module):
    """Zhu et al. 2025, hyper-connections: as many streams as layers, each read with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.reads = nn.ModuleList(nn.Linear(4 * DIM, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        streams = x[:, None].repeat(1, 4, 1)
        for layer, read in zip(self.layers, self.reads, strict=True):
            weights = read(streams.flatten(-2)).sigmoid().unbind(-1)
            given = sum(weight[:, None] * stream for weight, stream in zip(weights, streams.unbind(1), strict=True))
            streams = streams + layer(given)[:, None]
        return streams.sum(1)


class Codebook(nn.Module):
    """Van den Oord et al. 2017: the nearest code takes the place of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.layers = nn.Parameter(torch.randn(4, DIM)), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.codes[torch.cdist(x, self.codes).argmin(-1)]
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Cell(nn.Module):
    """An LSTM's, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.maps = nn.Linear(DIM, 4 * DIM), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(DIM))

    def forward(self, x: Tensor) -> Tensor:
        i, f, g, o = self.gates(x).chunk(4, -1)
        h = o.sigmoid() * (f.sigmoid() * x + i.sigmoid() * g.tanh()).tanh()
        return self.maps[0](h)


class Pooling(nn.Module):
    """Attention over positions, four heads of it, and a head of four classes behind four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.score, self.head = nn.Linear(DIM, 4), nn.Linear(4 * DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        x = x.unflatten(0, (4, -1))
        return self.head(torch.einsum("bnh,bnd->bhd", self.score(x).softmax(1), x).flatten(1)).softmax(-1)


NO_GATES = [SqueezeExcite, TwoHeads, Streams, Codebook, Cell, Pooling]


@pytest.mark.parametrize("kind", NO_GATES)
def test_no_gate_is_seen(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert find_gates(kind(), example=torch.randn(32, DIM)) == []
