"""Megatron-Core on CPUs: its own GPTModel, DDP, schedules and optimizers; 2 layers, 4 experts, 2 micro-batches, SGD.

Attention is replaced under context parallelism, where Megatron's own needs Transformer Engine, by one within each rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Slopes, by_hand, elsewhere, gathered, listening, same, sigmoid, softmax, terms, times
from .shims import no_cuda

HIDDEN, VOCABULARY, LENGTH, MICRO, BATCHES = 16, 32, 8, 2, 2
BIAS = torch.tensor([0.5, -0.5, 0.2, -0.2])


def ready() -> None:
    no_cuda()
    from megatron.core import jit

    jit.disable_jit_fuser()

    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import torch_norm

    # within an autograd function nothing takes its "cuda" for the CPU
    fused_softmax.get_default_causal_mask = lambda size: torch.triu(torch.ones(size, size), diagonal=1).bool()

    def norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> nn.LayerNorm:
        made = nn.LayerNorm(hidden_size, eps)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made

    torch_norm.WrappedTorchNorm.__new__ = norm  # Apex's and TE's know sequence parallelism
    plain: Any = torch.distributed.all_to_all_single

    def all_to_all(
        output: Tensor, given: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **k: Any
    ) -> Any:
        sizes = [s.tolist() if isinstance(s, Tensor) else s for s in (output_split_sizes, input_split_sizes)]
        return plain(output, given, *sizes, **k)

    torch.distributed.all_to_all_single = all_to_all  # type: ignore[assignment]  # on a GPU the sizes are lists by then
    torch.optim.AdamW = _Plain  # type: ignore[misc]  # the distributed optimizer takes nothing else


class _Plain(torch.optim.AdamW):
    """SGD in the place of Adam."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


class _Local(nn.Module):
    """Causal attention among the tokens that this rank has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (B, heads, S, d)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def _build(seed: int, setting: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    sizes = {name: setting.get(name, 1) for name in ("tp", "cp", "pp", "ep")}
    options: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 16,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "init_method_std": 0.3,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": sizes["tp"],
        "sequence_parallel": sizes["tp"] > 1,
        "context_parallel_size": sizes["cp"],
        "pipeline_model_parallel_size": sizes["pp"],
        "expert_model_parallel_size": sizes["ep"],
        "calculate_per_token_loss": setting.get("per_token", False),
        "moe_layer_freq": setting.get("layers", 1),
    }
    config = TransformerConfig(**{**options, **setting.get("config", {})})
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    if sizes["cp"] > 1:
        spec.submodules.self_attention.submodules.core_attention = _Local
    if "layers" in setting:  # dense ones among them
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    if setting.get("bias"):  # as under add_bias_linear, which Megatron's experts and projections do not run with here
        for router in _routers([model]).values():
            router.bias = nn.Parameter(BIAS.clone())
    sharded = setting.get("sharded", False)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded, overlap_grad_reduce=setting.get("overlap", False), grad_reduce_in_fp32=True
    )
    chunks = [DistributedDataParallel(config, ddp, model)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1.0, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=sharded, loss_scale=None
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if setting.get("overlap"):
        config.no_sync_func, config.grad_sync_func = chunks[0].no_sync, chunks[0].start_grad_sync
    return chunks, optimizer, config


def _routers(chunks: list[Any]) -> dict[str, Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {f"layer {router.layer_number}": router for router in found}


def _batches(setting: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    from megatron.core import parallel_state as mpu

    generator = torch.Generator().manual_seed(100 + mpu.get_data_parallel_rank())
    for _ in range(BATCHES):
        tokens = torch.randint(0, VOCABULARY, (MICRO, LENGTH + 1), generator=generator)
        mask = torch.rand(MICRO, LENGTH, generator=generator) > 0.4 if setting.get("masked") else torch.ones(MICRO, LENGTH)
        whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask.float()}
        whole["position_ids"] = torch.arange(LENGTH).expand(MICRO, LENGTH)
        cp, place = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        yield {name: tensor.chunk(cp, 1)[place].contiguous() for name, tensor in whole.items()}


def _step(chunks: list[Any], optimizer: Any, setting: dict[str, Any]) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def loss_func(mask: Tensor, output: Tensor) -> tuple[Any, ...]:
        total, count = (output * mask).sum(), mask.sum()
        if setting.get("three"):
            return total, count.int(), {}
        return total / count, {}

    def forward_step(data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        batch = next(data)
        extra = {"padding_mask": batch["loss_mask"] == 0} if setting.get("masked") else {}
        output = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"], **extra
        )
        return output, partial(loss_func, batch["loss_mask"])

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_batches(setting),
        model=chunks,
        num_microbatches=BATCHES,
        seq_length=LENGTH,
        micro_batch_size=MICRO,
        forward_only=False,
    )
    optimizer.step()


def measure(at_step: bool, kind: str, **setting: Any) -> dict[str, list[float]]:
    """Times for each layer's router."""
    from megatron.core import parallel_state as mpu

    from spectral_router.integrations.megatron import attach

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=setting.get("tp", 1),
        pipeline_model_parallel_size=setting.get("pp", 1),
        context_parallel_size=setting.get("cp", 1),
        expert_model_parallel_size=setting.get("ep", 1),
        expert_tensor_parallel_size=1,
    )
    try:
        after: list[Slopes] = []
        rest = []
        for wrapped in (False, True):
            chunks, optimizer, _ = _build(3, setting)
            routers = _routers(chunks)
            before = {name: router.weight.detach().clone() for name, router in routers.items()}
            if wrapped:
                attach(chunks, optimizer if at_step else None, **terms(kind))
                _step(chunks, optimizer, setting)
            else:
                with listening(routers, "recompute_granularity" in setting.get("config", {})) as heard:
                    _step(chunks, optimizer, setting)
            after.append({name: router.weight.detach().clone() for name, router in routers.items()})
            rest.append(elsewhere(chunks, routers))
        if at_step:
            same(*rest)
        if kind == "balance" and not at_step:  # elsewhere later layers' balance comes in from above
            before = {name: weight for name, weight in before.items() if name == "layer 2"}
        counted = setting.get("per_token") and not at_step  # a mean over tokens then
        counts = [int(batch["loss_mask"].sum()) for batch in _batches(setting)] if counted else None
        return gathered(times(after[0], after[1], by_hand(kind, before, heard, setting.get("score", softmax), counts)))
    finally:
        mpu.destroy_model_parallel()


def _sinkhorn(top_k: int) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": top_k, "moe_aux_loss_coeff": 0.0}


SETTINGS: dict[str, dict[str, Any]] = {
    "DP=2": {},
    "DP=2, overlap": {"overlap": True},
    "DP=2, distributed optimizer": {"sharded": True, "overlap": True},
    "EP=2": {"ep": 2},
    "TP=2, SP": {"tp": 2},
    "CP=2": {"cp": 2},
    "PP=2": {"pp": 2},
    "PP=2, a stage without gates": {"pp": 2, "layers": [0, 1]},
    "DP=2, 3-tuple loss_func": {"three": True},
    "DP=2, per-token loss": {"three": True, "per_token": True, "masked": False},
    "DP=2, per-token loss, masks": {"three": True, "per_token": True, "masked": True},
    "TP=2, SP, per-token loss": {"tp": 2, "three": True, "per_token": True},
    "CP=2, per-token loss": {"cp": 2, "three": True, "per_token": True},
    "DP=2, full recomputation": {
        "config": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    },
    "DP=2, sinkhorn, top 1": {"config": _sinkhorn(1), "score": sigmoid},
    "DP=2, sinkhorn, top 2": {"config": _sinkhorn(2)},
    "DP=2, gates with biases": {"bias": True, "score": lambda logits: softmax(logits + BIAS)},
    "DP=2, sigmoid scores": {
        "config": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        "score": sigmoid,
    },
}


def cases() -> dict[str, Any]:
    return {
        f"{name}; {'at the step' if at_step else 'in the loss'}; {kind}": partial(measure, at_step, kind, **setting)
        for name, setting in SETTINGS.items()
        for at_step in (False, True)
        for kind in ("penalty", "balance")
    }
