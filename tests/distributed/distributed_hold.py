"""Trained gates that are held, under DDP and FSDP2: a resumed run keeps the anchors that the first one made."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import torch
from distributed_fsdp import shard
from distributed_model import ALPHA, Model, batch, distance, gradients, share
from torch.nn.parallel import DistributedDataParallel

from spectral_router import MoEHandle, wrap_moe
from spectral_router.functional import spectral_norm, spectral_rank_penalty, stable_rank


def moved(model: Model) -> Model:
    """With gates of a lower stable rank and a higher norm than those of `model`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.layers:
            left, values, right = torch.linalg.svd(layer.router.weight, full_matrices=False)
            values[0] *= 2.0
            layer.router.weight.copy_(left * values @ right)
    return model


def by_hand(start: Model, now: Model) -> dict[str, torch.Tensor]:
    x, y, _ = batch()
    loss = now(x, y)["loss"]
    for first, layer in zip(start.layers, now.layers, strict=True):
        weight = first.router.weight.detach()
        targets = spectral_norm(weight), stable_rank(weight)
        loss = loss + ALPHA * spectral_rank_penalty(layer.router.weight, *targets, relative=True, one_sided=True)
    loss.backward()
    return gradients(now)


def run(model: Model, rank: int, engine: str, wrap: str, state: dict | None = None) -> MoEHandle:
    """One step with gradients, from the anchors in `state` if there are any."""
    options = {"penalty": "hold", "balance": None, "penalty_coef": ALPHA}
    handle = wrap_moe(model, **options) if wrap == "before" else None
    if engine == "ddp":
        called = DistributedDataParallel(model)
    else:
        shard(model, "layer")
        called = model
    handle = handle or wrap_moe(called, **options)
    if state is not None:
        handle.load_state_dict(state)
    called(*share(rank))["loss"].backward()
    return handle


def resume(rank: int, *, engine: str, wrap: str) -> float:
    start = Model()
    later = moved(start)
    wanted = by_hand(start, copy.deepcopy(later))
    held = copy.deepcopy(later)
    assert distance(by_hand(later, held), wanted) > 0.1, "the anchors are of no consequence"
    first = run(copy.deepcopy(start), rank, engine, wrap)
    handle = run(later, rank, engine, wrap, first.state_dict())
    assert torch.equal(handle.penalty.rank_anchor, first.penalty.rank_anchor)
    rows = handle.metrics().values()
    assert all(row["rank_drift"] < -0.1 and row["sigma_drift"] > 0.5 for row in rows), rows
    return distance(gradients(later), wanted)


CHECKS = {
    f"resume-{engine}-{wrap}": partial(resume, engine=engine, wrap=wrap)
    for engine, wrap in itertools.product(("ddp", "fsdp"), ("before", "after"))
}
