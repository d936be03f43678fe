"""Checks under DistributedDataParallel: each gives the largest relative error of a gradient."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

from distributed_model import Model, distance, expected, gradients, share, terms
from torch.nn.parallel import DistributedDataParallel

from spectral_router import wrap_moe


def check(
    rank: int,
    *,
    wrap: str,
    mode: str = "none",
    deliver: str = "added",
    sync: bool = True,
    kind: str = "part",
    idle: bool = False,
    **options: bool,
) -> float:
    model = Model(mode=mode, with_loss=deliver == "added", idle=idle)
    wanted = expected(model, kind, sync)
    handle = wrap_moe(model, **terms(sync)) if wrap == "before" else None
    ddp = DistributedDataParallel(model, **options)
    handle = handle or wrap_moe(ddp, **terms(sync))
    if idle:
        warnings.filterwarnings("ignore", "these gates did not run in the first training forward")
    for _ in range(2):  # DDP settles its buckets in the first step
        ddp.zero_grad()
        output = ddp(*share(rank, kind))
        (output["loss"] if deliver == "added" else output + handle.loss()).backward()
    return distance(gradients(ddp), wanted)


CHECKS = {
    f"{wrap}-{mode}-{deliver}-{'sync' if sync else 'alone'}": partial(check, wrap=wrap, mode=mode, deliver=deliver, sync=sync)
    for wrap, mode, deliver, sync in itertools.product(
        ("before", "after"), ("none", "nonreentrant", "reentrant"), ("added", "taken"), (True, False)
    )
}
for _sync in (True, False):
    CHECKS[f"a rank without tokens-{'sync' if _sync else 'alone'}"] = partial(check, wrap="before", sync=_sync, kind="none")
for _wrap in ("before", "after"):
    CHECKS[f"idle gate-{_wrap}-added"] = partial(check, wrap=_wrap, idle=True, find_unused_parameters=True)
    # DDP looks for unused parameters in what the model returns: a term of one that comes beside it needs a static graph
    CHECKS[f"idle gate-{_wrap}-taken"] = partial(check, wrap=_wrap, idle=True, deliver="taken", static_graph=True)
