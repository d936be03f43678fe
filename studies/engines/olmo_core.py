"""OLMo-core on CPUs: its own train module, `train_batch` and `optim_step` on a small OLMoE; its experts' kernels replaced."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .measure import Slopes, by_hand, elsewhere, gathered, listening, same, sigmoid, softmax, terms, times

HIDDEN, LENGTH, ROWS, VOCABULARY = 32, 8, 4, 64


def ready() -> None:
    from olmo_core.nn.moe import parallel_mlp

    def forward(self: Any, x: Tensor, weights: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """Every expert on all tokens, those that did not choose it times 0: what the Triton kernels sort, pad and multiply."""
        mlp, flat = self.mlp, x.reshape(-1, x.shape[-1])
        weights, indices = weights.reshape(len(flat), -1), indices.reshape(len(flat), -1)
        w1, w2, w3 = (_local(w).reshape(mlp.num_experts, -1, flat.shape[-1]) for w in (mlp.w1, mlp.w2, mlp.w3))
        total = torch.zeros_like(flat)
        for expert in range(mlp.num_experts):
            share = (weights * (indices == expert)).sum(-1, keepdim=True)
            total = total + share * ((nn.functional.silu(flat @ w1[expert].mT) * (flat @ w3[expert].mT)) @ w2[expert])
        return total.reshape(x.shape)

    parallel_mlp.ParallelMLPBase.forward = forward


def _local(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _module(rank_batch: int, name: str | None, own: bool, scoring: str) -> Any:
    import olmo_core.distributed.parallel as meshes
    from olmo_core.config import DType
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.moe.router import MoERouterGatingFunction
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.train.train_module import TransformerTrainModule
    from olmo_core.train.train_module.transformer import TransformerDataParallelConfig

    config = TransformerConfig.llama_like_moe(
        d_model=HIDDEN,
        vocab_size=VOCABULARY,
        n_layers=2,
        n_heads=2,
        num_experts=4,
        top_k=2,
        expert_hidden_size=16,
        lb_loss_weight=0.01 if own else None,
        z_loss_weight=None,
        dropless=True,
    )

    config.block.feed_forward_moe.router.gating_function = MoERouterGatingFunction(scoring)

    class Plain:
        def build(self, model: nn.Module, strict: bool = True) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=1.0)

    meshes._WORLD_MESH = None  # one a process otherwise
    torch.manual_seed(2)
    module = TransformerTrainModule(
        config.build(init_device="cpu" if name is None else "meta"),
        Plain(),
        rank_batch,
        LENGTH,
        dp_config=None
        if name is None
        else TransformerDataParallelConfig(name=DataParallelType[name], reduce_dtype=DType.float32),
        device=torch.device("cpu"),
    )
    module.record_metric = module.record_ce_loss = lambda *args, **kwargs: None
    return module


def _gates(module: Any) -> dict[str, nn.Module]:
    from olmo_core.nn.moe.router import MoERouter

    found = [m for m in module.model.modules() if isinstance(m, MoERouter)]
    return {f"layer {number}": router for number, router in enumerate(found)}


def _weights(module: Any) -> Slopes:
    routers: dict[str, Any] = _gates(module)
    return {name: _local(router.weight.detach()).reshape(4, HIDDEN).clone() for name, router in routers.items()}


def measure(
    at_step: bool,
    kind: str,
    name: str | None,
    batches: int,
    masked: bool = False,
    own: bool = False,
    score: Any = softmax,
) -> Any:
    """Times for each layer's router."""
    from spectral_router import wrap_moe

    after, rest = [], []
    for wrapped in (False, True):
        module = _module(ROWS // batches * LENGTH, name, own, score.__name__)
        before = _weights(module)
        generator = torch.Generator().manual_seed(9 + dist.get_rank())
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        labels = ids.clone()
        if masked:
            labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        if wrapped:
            wrap_moe(module.model, module.optim if at_step else None, **terms(kind))
        module.zero_grads()
        with listening(_gates(module)) as heard:
            module.train_batch({"input_ids": ids, "labels": labels})
        module.optim_step()
        if not wrapped:
            known = heard
        after.append(_weights(module))
        rest.append(elsewhere([module.model], _gates(module)))
    if at_step:
        same(*rest)
    rows = labels.split(ROWS // batches)
    counts = None if at_step else [float(part.ne(-100).sum() / labels.ne(-100).sum()) for part in rows]
    if kind == "balance" and not at_step:
        before = {"layer 1": before["layer 1"]}
    return gathered(times(after[0], after[1], by_hand(kind, before, known, score, counts)))


SETTINGS: dict[str, dict[str, Any]] = {
    "DDP, 1 micro-batch": {"name": "ddp", "batches": 1},
    "DDP, 4 micro-batches": {"name": "ddp", "batches": 4},
    "FSDP2, 4 micro-batches": {"name": "fsdp", "batches": 4},
    "FSDP2, 4 micro-batches, sigmoid scores": {"name": "fsdp", "batches": 4, "score": sigmoid},
    "FSDP2, 4 micro-batches, masked labels": {"name": "fsdp", "batches": 4, "masked": True},
    "FSDP2, 4 micro-batches, its own balance loss on": {"name": "fsdp", "batches": 4, "own": True},
}


def cases() -> dict[str, Any]:
    return {
        f"{name}; {'at the step' if at_step else 'in the loss'}; {kind}": partial(measure, at_step, kind, **setting)
        for name, setting in SETTINGS.items()
        for at_step in (False, True)
        for kind in ("penalty", "balance")
    }
