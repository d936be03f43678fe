"""`surgical` under DDP and FSDP2: each check gives 0 where every bit off the path stayed, on every rank, and the path moved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spectral_router import find_gates, surgical

DIM, EXPERTS = 8, 5


class Experts(nn.Module):
    """Stacked over an odd number of experts, so that shards cut unevenly, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 3)
        self.b = nn.Parameter(torch.randn(EXPERTS, DIM) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,edf->enf", x, self.w) + self.b[:, None]


class Flat(nn.Module):
    """The same by rows of one matrix, which shards cut inside of an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS * DIM, DIM) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,edf->enf", x, self.w.view(EXPERTS, DIM, DIM))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.each])


class Block(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS)
        self.experts = experts()
        self.top_k = 2
        self.num_experts = EXPERTS

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weights, indices = probs.topk(self.top_k)
        combine = torch.zeros_like(probs).scatter(-1, indices, weights)
        return x + torch.einsum("ne,enf->nf", combine, self.experts(x).tanh())


class Model(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Block(experts) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x)
        return x


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        yield name, whole(parameter)
        for key, value in optimizer.state[parameter].items():
            if value.shape == parameter.shape:
                yield f"{name}/{key}", whole(value)


def masks(model: Model, path, kind: type[nn.Module]) -> dict[str, Tensor]:
    """By hand: True where a parameter belongs to an expert on the path."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(path.layers):
        for expert in layer.experts:
            place = f"layers.{number}.experts"
            if kind is Layers:
                found |= {f"{place}.each.{expert}.{part}": torch.tensor(True) for part in ("weight", "bias")}
                continue
            rows = slice(expert * DIM, (expert + 1) * DIM) if kind is Flat else slice(expert, expert + 1)
            for part in ("w", "b") if kind is Experts else ("w",):
                shape = getattr(model.layers[number].experts, part).shape
                found.setdefault(f"{place}.{part}", torch.zeros(shape, dtype=torch.bool))[rows] = True
    return found


def check(rank: int, *, engine: str, kind: type[nn.Module], fused: bool) -> float:
    model = Model(kind)
    if kind is Flat:  # sharded, a block cannot be tried on tokens of its own
        surgical(model, torch.randn(2, DIM), top=1)
    torch.manual_seed(1 + rank)
    x = torch.randn(6, DIM)
    outer: nn.Module = model
    if engine == "fsdp":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif engine == "ddp before":
        outer = DistributedDataParallel(model, find_unused_parameters=kind is Layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)

    def step(module: nn.Module) -> None:
        F.mse_loss(module(x), x + 1).backward()
        optimizer.step()
        optimizer.zero_grad()

    if engine != "ddp inside":
        step(outer)
    before = dict(state(model, optimizer))
    with surgical(model, x, top=1, freeze=engine != "ddp before") as path:
        mine = [list(layer.experts) for layer in path.layers]
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        assert all(other == mine for other in everyone), everyone
        if engine == "ddp inside":
            outer = DistributedDataParallel(model)
        for _ in range(2):
            step(outer)
    allowed, moved = masks(model, path, kind), 0
    for name, value in state(model, optimizer):
        mask = allowed.get(name.partition("/")[0], torch.tensor(False)).expand(value.shape)
        old = before.get(name, torch.zeros_like(value))
        if ((value != old) & ~mask).any():
            return float((value - old)[~mask].abs().max())
        moved += int((value != old).sum()) if "/" not in name else 0
        copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, value.contiguous())
        assert all(torch.equal(copy, value) for copy in copies), f"{name} differs between ranks"
    assert moved > 0
    assert len(find_gates(model)) == 2
    return 0.0


CHECKS = {
    f"{engine}-{kind.__name__}-{'fused' if fused else 'foreach'}": partial(check, engine=engine, kind=kind, fused=fused)
    for engine, kind, fused in itertools.product(("ddp before", "ddp inside", "fsdp"), (Experts, Layers), (False, True))
}
