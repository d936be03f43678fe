"""DeepSpeed's ZeRO steps flat copies of the parameters: delivery at the step is refused by name. 0 if it is."""

from __future__ import annotations

import os
import warnings
from functools import partial

from distributed_model import Model, terms
from torch.optim import SGD

from spectral_router import wrap_moe


def check(rank: int, *, stage: int) -> float:
    warnings.simplefilter("default")  # DeepSpeed's own
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    model = Model().float()
    engine, *_ = deepspeed.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.1), config=config)
    try:
        wrap_moe(engine, engine.optimizer, **terms())
    except TypeError as error:
        return 0.0 if "ZeRO" in str(error) and "leave" in str(error) else 1.0
    finally:
        engine.destroy()
    return 1.0


CHECKS = {f"stage {stage}": partial(check, stage=stage) for stage in (1, 2, 3)}
