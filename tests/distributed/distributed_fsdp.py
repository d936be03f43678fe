"""Checks under FSDP2: each gives the largest relative error of a gradient."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import torch.distributed as dist
from distributed_model import SIGMA, Model, distance, expected, gradients, share, terms
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from spectral_router import wrap_moe
from spectral_router.functional import spectral_norm, spectral_rank_penalty


def shard(model: Model, unit: str, **options: bool) -> None:
    for layer in [*model.layers, *filter(None, [model.idle])]:
        if unit == "gate":
            fully_shard(layer.router, **options)
        if unit != "root":
            fully_shard(layer, **options)
    fully_shard(model, **options)


def check(
    rank: int,
    *,
    wrap: str,
    mode: str = "none",
    unit: str = "layer",
    deliver: str = "added",
    reshard: bool = True,
    **changes: object,
) -> float:
    model = Model(mode=mode.removesuffix(" outside"), with_loss=deliver == "added", **changes)
    wanted = expected(model)
    handle = wrap_moe(model, **terms()) if wrap == "before" else None
    if mode.endswith(" outside"):  # sharding's hooks around the checkpoint, not in it
        model.mode = "none"
        for i, layer in enumerate(model.layers):
            model.layers[i] = checkpoint_wrapper(layer)
    shard(model, unit, reshard_after_forward=reshard)
    handle = handle or wrap_moe(model, **terms())
    if model.idle is not None:
        warnings.filterwarnings("ignore", "these gates did not run in the first training forward")
    for _ in range(2):
        model.zero_grad()
        output = model(*share(rank, ranks=dist.get_world_size()))
        (output["loss"] if deliver == "added" else output + handle.loss()).backward()
    return distance(gradients(model), wanted)


def metrics(rank: int, *, wrap: str) -> float:
    model = Model()
    weights = {f"layers.{i}.router": layer.router.weight.detach().clone() for i, layer in enumerate(model.layers)}
    handle = wrap_moe(model, **terms()) if wrap == "before" else None
    shard(model, "layer")
    handle = handle or wrap_moe(model, **terms())
    model(*share(rank))["loss"].backward()
    rows = handle.metrics()
    assert rows.keys() == weights.keys()
    assert all(0 < row["entropy"] < 1 for row in rows.values())
    errors = [abs(rows[name]["sigma_max"] / spectral_norm(weight).item() - 1) for name, weight in weights.items()]
    return max(
        errors + [abs(rows[name]["penalty"] / spectral_rank_penalty(w, SIGMA).item() - 1) for name, w in weights.items()]
    )


CHECKS = {
    f"{wrap}-{mode}-{unit}-{deliver}": partial(check, wrap=wrap, mode=mode, unit=unit, deliver=deliver)
    for wrap, mode, unit, deliver in itertools.product(
        ("before", "after"),
        ("none", "nonreentrant", "nonreentrant outside", "reentrant"),
        ("layer", "gate", "root"),
        ("added", "taken"),
    )
}
for _wrap in ("before", "after"):
    CHECKS[f"metrics-{_wrap}"] = partial(metrics, wrap=_wrap)
    for _unit, _deliver, _reshard in itertools.product(("layer", "gate", "root"), ("added", "taken"), (True, False)):
        CHECKS[f"idle gate-{_wrap}-{_unit}-{_deliver}-{'resharded' if _reshard else 'whole'}"] = partial(
            check, wrap=_wrap, unit=_unit, deliver=_deliver, reshard=_reshard, idle=True
        )
