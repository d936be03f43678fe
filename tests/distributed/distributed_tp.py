"""Checks with gates in tensor parallel: each rank sees the whole batch; the weight is a DTensor, replicated or sharded."""

from __future__ import annotations

import itertools
from functools import partial

from distributed_model import Model, batch, distance, expected, gradients, terms
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from spectral_router import wrap_moe

STYLES = {
    "colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def parallelize(router: nn.Module, mesh: DeviceMesh, style: str) -> None:
    if style == "replicated":
        distribute_module(router, mesh, input_fn=_to_dtensor, output_fn=_to_local)
    else:
        parallelize_module(router, mesh, STYLES[style]())


def _to_dtensor(_module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
    return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)


def _to_local(_module: nn.Module, output: Tensor, _mesh: DeviceMesh) -> Tensor:
    return output.to_local()


def check(rank: int, *, wrap: str, style: str, mode: str, sync: bool = True) -> float:
    model = Model(mode=mode)
    wanted = expected(model)
    handle = wrap_moe(model, **terms(sync)) if wrap == "before" else None
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        parallelize(layer.router, mesh, style)
    handle = handle or wrap_moe(model, **terms(sync))
    x, y, mask = batch()
    model(x, y, attention_mask=mask)["loss"].backward()
    assert all(0 < row["entropy"] < 1 for row in handle.metrics().values())
    return distance(gradients(model), wanted)


CHECKS = {
    f"{wrap}-{style}-{mode}-{'sync' if sync else 'alone'}": partial(check, wrap=wrap, style=style, mode=mode, sync=sync)
    for wrap, style, mode, sync in itertools.product(
        ("before", "after"), ("replicated", "colwise", "rowwise"), ("none", "reentrant"), (True, False)
    )
}
