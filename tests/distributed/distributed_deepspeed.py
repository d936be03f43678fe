"""Checks under DeepSpeed ZeRO on the CPU: each gives the largest relative error of a gradient, in float32."""

from __future__ import annotations

import itertools
import os
import warnings
from functools import partial

from distributed_model import Model, distance, expected, share, terms
from torch.optim import SGD

from spectral_router import wrap_moe
from spectral_router.functional import spectral_norm


def check(rank: int, *, wrap: str, stage: int = 3, mode: str = "none", deliver: str = "added", **changes: bool) -> float:
    warnings.simplefilter("default")  # DeepSpeed's own
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed(dist_backend="gloo")
    changes |= {"mode": mode, "with_loss": deliver == "added"}
    wanted = expected(Model(**changes))
    sigmas = {name: spectral_norm(p).item() for name, p in Model(**changes).named_parameters() if "router" in name}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = Model(**changes).float()
    if wrap == "sharded":  # from the start, as large models are loaded
        values = model.state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Model(**changes)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if rank == 0:
                model.load_state_dict(values)
    handle = None if wrap == "after" else wrap_moe(model, **terms())
    engine, *_ = deepspeed.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.1), config=config)
    handle = handle or wrap_moe(engine, **terms())
    for _ in range(2):
        x, y, mask = share(rank)
        output = engine(x.float(), y.float(), mask)
        engine.backward(output["loss"] if deliver == "added" else output + handle.loss())
        grads = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
        engine.zero_grad()
        engine.optimizer.zero_grad()
    assert {gate.name: gate.dim for gate in handle.gates} == {name.removesuffix(".weight"): 6 for name in sigmas}
    seen = {name: row["sigma_max"] for name, row in handle.metrics().items()}
    assert all(abs(seen[name.removesuffix(".weight")] / sigma - 1) < 1e-5 for name, sigma in sigmas.items())
    engine.destroy()
    return distance({name: grad.double() for name, grad in grads.items()}, wanted)


CHECKS = {
    f"{wrap}-{mode}-{deliver}": partial(check, wrap=wrap, mode=mode, deliver=deliver)
    for wrap, mode, deliver in itertools.product(("before", "after"), ("none", "reentrant"), ("added", "taken"))
}
for _wrap in ("before", "after", "sharded"):
    CHECKS[f"{_wrap}-nonreentrant-added"] = partial(check, wrap=_wrap, mode="nonreentrant")
    CHECKS[f"idle gate-{_wrap}"] = partial(check, wrap=_wrap, idle=True)
for _stage in (1, 2):
    CHECKS[f"stage {_stage}"] = partial(check, wrap="after", stage=_stage)
