"""Checks of controllers under DistributedDataParallel: the largest error of gradients and states against one process."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spectral_router import PrototypeRouter
from spectral_router.balance.controllers import ImportanceConstraint, LossFreeBias
from spectral_router.routing.route import route

DIM, STEPS = 6, 8
SIZES = [(9, 4), (3, 10), (7, 0), (0, 0), (5, 5)]  # tokens of each rank, step by step
CONTROLLERS: dict[str, Callable[..., nn.Module]] = {
    "relative": partial(ImportanceConstraint, bound=0.1),
    "mean": partial(ImportanceConstraint, bound=0.05, kind="mean"),
    "momentum": partial(ImportanceConstraint, bound=0.05, kind="mean", momentum=0.3),
    "bias": partial(LossFreeBias, rate=0.3),
}


class Model(nn.Module):
    def __init__(self, kind: str, num_experts: int, top_k: int | None, *, sync: bool, mode: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mode = mode
        self.into = nn.Linear(DIM, DIM)
        self.router = PrototypeRouter(DIM, num_experts, top_k=top_k, metric="dot", temperature=0.3)
        self.router.prototypes.data[0] += 0.5  # the expert that all want
        self.router.controller = CONTROLLERS[kind](num_experts, sync=sync)
        self.experts = nn.Parameter(torch.randn(num_experts, DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        return self.layer(h) if self.mode == "none" else checkpoint(self.layer, h, use_reentrant=self.mode == "reentrant")

    def layer(self, h: Tensor) -> Tensor:
        weights, indices = self.router(h)[2:]
        placed = torch.zeros(len(h), len(self.experts)).scatter(-1, indices, weights)
        return torch.einsum("td,kdo,tk->to", h, self.experts, placed).tanh()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The ranks' shares of one step, of different sizes and kinds of token."""
    generator = torch.Generator().manual_seed(step)
    first, second = (torch.randn(size, DIM, generator=generator) for size in SIZES[step % len(SIZES)])
    return first + 0.7, second - 0.2


def loss(model: nn.Module, x: Tensor, tokens: int) -> Tensor:
    return (model(x) - 0.5).square().sum() / max(tokens, 1)


def update(model: nn.Module) -> list[Tensor]:
    """One step of gradient descent; the gradients."""
    grads = []
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        grads.append(grad)
        parameter.data.sub_(0.1 * grad)
        parameter.grad = None
    return grads


def check(
    rank: int,
    *,
    kind: str,
    top_k: int | None,
    num_experts: int = 4,
    mode: str = "none",
    broadcast: bool = False,
    reload: bool = False,
    compiled: bool = False,
) -> float:
    build = partial(Model, kind, num_experts, top_k)
    alone, model = build(sync=False, mode="none"), build(sync=True, mode=mode)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)  # of one expert
    if compiled:
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)  # the compiler's
        model.router.compile(backend="aot_eager", fullgraph=True)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    start, errors, fewer = copy.deepcopy(alone.router.controller.state_dict()), [0.0], 0
    for step in range(STEPS):
        if reload and step == STEPS // 2:
            model = build(sync=True, mode=mode, seed=5 + rank)
            model.load_state_dict(sent(ddp.module.state_dict() if rank == 0 else None))
            ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        shares = batch(step)
        tokens = sum(map(len, shares))
        if kind != "bias":
            fewer += int(alone.router.controller.open.sum() < (top_k or num_experts))
        loss(alone, torch.cat(shares), tokens).backward()
        (2 * loss(ddp, shares[rank], tokens)).backward()  # DDP takes the mean of the two ranks
        got, wanted = update(model), update(alone)
        got += list(model.router.controller.state_dict().values())
        wanted += list(alone.router.controller.state_dict().values())
        for one, two in zip(got, wanted, strict=True):
            errors.append(((one - two).double().norm() / two.double().norm().clamp_min(1)).item())
    if num_experts > 1:  # otherwise these steps show nothing
        assert not all(torch.equal(start[name], value) for name, value in alone.router.controller.state_dict().items())
        assert fewer or kind == "bias" or top_k in (1, 2)
    return max(errors)


def sent(state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The file that rank 0 saves, loaded on every rank."""
    files: list[bytes | None] = [None]
    if state is not None:
        torch.save(state, buffer := io.BytesIO())
        files = [buffer.getvalue()]
    dist.broadcast_object_list(files)
    assert files[0] is not None
    return torch.load(io.BytesIO(files[0]))


def each_its_own(rank: int, *, kind: str) -> float:
    """Without `sync` a rank counts its own tokens."""
    synced, own, alone = (CONTROLLERS[kind](4, sync=sync) for sync in (True, False, False))

    for step in range(4):
        shares = [share @ torch.eye(DIM, 4) for share in batch(step)]
        route(shares[rank], 2, controller=own)
        route(shares[rank], 2, controller=synced)
        route(torch.cat(shares), 2, controller=alone)
    name = "bias" if kind == "bias" else "importance"
    error, gap = (getattr(one, name) - getattr(alone, name) for one in (synced, own))
    dist.all_reduce(total := gap.norm())
    return error.norm().item() if total > 1e-3 else 1.0


def nan_on_one_rank(rank: int, *, kind: str) -> float:
    """Then no rank counts the step."""

    controller = CONTROLLERS[kind](4)
    route(torch.randn(5, 4) + torch.arange(4), 2, controller=controller)
    before = [buffer.clone() for buffer in controller.state_dict().values()]
    route(torch.full((3, 4), float("nan") if rank == 0 else 1.0), 2, controller=controller)
    return 0.0 if all(map(torch.equal, before, controller.state_dict().values())) else 1.0


CHECKS = {}
for _kind in CONTROLLERS:
    for _top_k in (None, 1, 2, 4):
        CHECKS[f"{_kind}-top_k {_top_k}"] = partial(check, kind=_kind, top_k=_top_k)
    CHECKS[f"{_kind}-buffers of rank 0"] = partial(check, kind=_kind, top_k=2, broadcast=True)
    for _mode in ("nonreentrant", "reentrant"):
        CHECKS[f"{_kind}-{_mode}"] = partial(check, kind=_kind, top_k=2, mode=_mode)
    CHECKS[f"{_kind}-saved and loaded"] = partial(check, kind=_kind, top_k=2, reload=True)
    for _top_k in (None, 1):
        CHECKS[f"{_kind}-one expert-top_k {_top_k}"] = partial(check, kind=_kind, top_k=_top_k, num_experts=1)
    CHECKS[f"{_kind}-each its own"] = partial(each_its_own, kind=_kind)
    CHECKS[f"{_kind}-NaN"] = partial(nan_on_one_rank, kind=_kind)
CHECKS["compiled"] = partial(check, kind="relative", top_k=2, compiled=True)
