"""Checks of delivery at the optimizer's step, on two processes: each gives the largest relative error of a gradient."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import torch
from distributed_fsdp import shard
from distributed_model import ALPHA, BETA, SIGMA, Block, Model, batch, distance, gradients, share, terms
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from spectral_router import wrap_moe
from spectral_router.functional import load_balance_loss, spectral_rank_penalty


def by_hand(model: Model, sync: bool) -> dict[str, Tensor]:
    """Of the task on the global batch, and of the term with respect to the gates alone."""
    model = copy.deepcopy(model)
    model.mode = "none"
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    inputs: list[Tensor] = []
    hooks = [block.router.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach())) for block in blocks]
    parts = [batch()] if sync else [share(rank) for rank in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    for x, y, mask in parts:
        inputs.clear()
        model(x, y)
        balance = sum(
            load_balance_loss((seen @ block.router.weight.mT).softmax(-1), mask)
            for seen, block in zip(inputs, blocks, strict=True)
        )
        total = total + BETA * balance / len(parts)
    for hook in hooks:
        hook.remove()
    output = model(*batch()[:2])
    task = output["loss"] if model.with_loss else output
    penalty = sum(spectral_rank_penalty(block.router.weight, SIGMA) for block in blocks)
    (task + ALPHA * penalty + total).backward()
    return gradients(model)


def check(
    rank: int, *, engine: str, mode: str = "none", accumulation: int = 1, sync: bool = True, with_loss: bool = True
) -> float:
    model = Model(mode=mode, with_loss=with_loss)
    wanted = by_hand(model, sync)
    if engine == "ddp":
        outer: torch.nn.Module = DistributedDataParallel(model)
    else:
        shard(model, engine)
        outer = model
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.0)
    wrap_moe(outer, optimizer, **terms(sync))
    for _ in range(2):  # the second step must not know of the first
        optimizer.zero_grad()
        for _ in range(accumulation):
            output = outer(*share(rank))
            # somebody else builds the loss, and scales it
            loss = output["loss"] if with_loss else output
            (loss / accumulation).backward()
        optimizer.step()
    return distance(gradients(outer), wanted)


CHECKS = {
    f"{engine}-{mode}-{accumulation}-{'sync' if sync else 'alone'}": partial(
        check, engine=engine, mode=mode, accumulation=accumulation, sync=sync
    )
    for engine, mode, (accumulation, sync) in itertools.product(
        ("ddp", "layer", "gate", "root"), ("none", "nonreentrant", "reentrant"), ((1, True), (1, False), (3, True))
    )
}
CHECKS["no loss in the output"] = partial(check, engine="ddp", with_loss=False)
