"""torchtitan on CPUs: its own Trainer, `train_step`, FSDP2, tensor parallelism and compile on a small Qwen3 with experts.

Its data loader is replaced by one of random tokens, its Adam by SGD, so that an update is a gradient; nothing is clipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .measure import Slopes, by_hand, elsewhere, gathered, listening, same, sigmoid, softmax, terms, times

LENGTH, BATCH, RATE = 16, 2, 1.0


def ready() -> None:
    import torchtitan.tools.utils as tools

    tools.device_type, tools.device_module = "cpu", torch.cpu
    tools.get_local_device = lambda: torch.device("cpu")
    tools.get_peak_flops = lambda name: 1.0
    torch.cpu.set_device = lambda device: None

    from torch.distributed.fsdp import FSDPModule
    from torchtitan.components import metrics
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.models.common import attention

    class Memory:
        device_name = "cpu"

        def get_peak_stats(self) -> Any:
            return metrics.DeviceMemStats(*[0.0] * len(metrics.DeviceMemStats._fields))

        def reset_peak_stats(self) -> None: ...

    metrics.build_device_memory_monitor = Memory
    plain = FSDPModule.set_gradient_divide_factor

    def summed(self: Any, factor: float) -> None:  # Gloo cannot multiply and sum in one
        plain(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = summed  # type: ignore[method-assign]
    # no files of text: `train_step` gets its batches from here
    HuggingFaceTokenizer.__init__ = HuggingFaceTextDataLoader.__init__ = lambda self, *args, **kwargs: None

    def dense(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> tuple[Tensor, None]:  # flex has no backward on CPUs
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=others["enable_gqa"]), None

    attention.FlexAttention._compiled_flex_attn = staticmethod(dense)
    attention._compiled_create_block_mask = attention.create_block_mask


def _loader(rank: int, vocabulary: int, masked: bool) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(7 + rank)
    while True:
        tokens = torch.randint(0, vocabulary, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        if masked:
            labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
        yield {"input": tokens[:, :-1].contiguous(), "positions": positions}, labels


def _trainer(setting: dict[str, Any], folder: str) -> Any:
    import torchtitan.components.optimizer.optimizer as optimizers
    import torchtitan.models.qwen3 as qwen3
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": g["params"], "lr": RATE} for g in groups])

    optimizers.OptimizersContainer._resolve_optimizer_factory = staticmethod(lambda name: sgd)
    config = qwen3.Qwen3Model.Config(
        vocab_size=64,
        dim=32,
        norm=qwen3._qwen3_norm(32),
        tok_embeddings=Embedding.Config(num_embeddings=64, embedding_dim=32, param_init=qwen3._EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=32, out_features=64, param_init=qwen3._LINEAR_INIT),
        layers=qwen3._build_qwen3_moe_layers(
            n_layers=setting.get("layers", 2),
            dim=32,
            n_heads=4,
            n_kv_heads=2,
            head_dim=16,
            moe_hidden_dim=32,
            num_experts=8,
            top_k=2,
            attn_backend="flex",
            moe_comm_backend="standard",
            rope=CosSinRoPE.Config(dim=16, max_seq_len=64, theta=10000.0),
        ),
    )
    if setting.get("score") is sigmoid:
        for layer in config.layers:
            layer.moe.router.score_func = "sigmoid"
    spec = ModelSpec(
        name="qwen3",
        flavor="small",
        model=config,
        parallelize_fn=qwen3.parallelize_qwen3,
        pipelining_fn=qwen3.pipeline_llm,
        post_optimizer_build_fn=qwen3.register_moe_load_balancing_hook,
        state_dict_adapter=None,
    )
    tp, pp, batches = setting.get("tp", 1), setting.get("pp", 1), setting.get("accumulate", 1)
    degree = 2 // (tp * pp)
    job = Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=64),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test"),
        metrics=MetricsProcessor.Config(log_freq=1000),
        optimizer=default_adamw(lr=RATE),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(
            local_batch_size=BATCH,
            global_batch_size=BATCH * degree * batches,
            seq_len=LENGTH,
            steps=2,
            max_norm=1e9,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(
            tensor_parallel_degree=tp,
            pipeline_parallel_degree=pp,
            pipeline_parallel_microbatch_size=BATCH if pp == 1 else 1,
            spmd_backend=setting.get("backend", "spmd_types"),
        ),
        checkpoint=CheckpointManager.Config(enable=False),
        activation_checkpoint=setting.get("checkpointing"),
        compile=CompileConfig(enable="compile" in setting, components=["model"], backend=setting.get("compile", "aot_eager")),
        debug=DebugConfig(seed=3, enable_structured_logging=False),
        dump_folder=folder,
    )
    return Trainer(job)


def _gates(trainer: Any) -> dict[str, Any]:
    found = {name: m for part in trainer.model_parts for name, m in part.named_modules() if name.endswith("router.gate")}
    return {name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): gate for name, gate in found.items()}


def _weights(trainer: Any) -> Slopes:
    whole = {}
    for name, gate in _gates(trainer).items():
        weight = gate.weight.detach()
        whole[name] = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).clone()
    return whole


def measure(deliver: str, kind: str, **setting: Any) -> dict[str, list[float]]:
    """Times for each layer's gate."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    after: list[Slopes] = []
    rest = []
    for wrapped in (False, True):
        torch._dynamo.reset()
        _clear_sharding_prop_cache()  # it gives a second trainer the meshes of the first, which `fully_shard` refuses
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(setting, folder)
        for name, gate in _gates(trainer).items():  # a start that the penalty moves
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            values = 0.3 * torch.randn(8, 32, generator=generator)
            weight = gate.weight
            with torch.no_grad():
                if hasattr(weight, "device_mesh"):
                    from torch.distributed.tensor import distribute_tensor

                    weight.copy_(distribute_tensor(values, weight.device_mesh, weight.placements))
                else:
                    weight.copy_(values)
        before = _weights(trainer)
        trainer.metrics_processor.data_loading_times.append(1.0)
        replicas = dist.get_rank() if setting.get("tp", 1) * setting.get("pp", 1) == 1 else 0
        data = _loader(replicas, 64, setting.get("masked", False))
        if wrapped:
            from spectral_router.integrations.torchtitan import attach

            attach(trainer, at_step=deliver == "at the step", **terms(kind))
            trainer.train_step(data)
        else:
            # hooks of others would be in the compiled code
            with listening({} if "compile" in setting else _gates(trainer)) as heard:
                trainer.train_step(data)
        after.append(_weights(trainer))
        rest.append(elsewhere(trainer.model_parts, _gates(trainer)))
    if deliver == "at the step":
        same(*rest)
    if "pp" in setting:  # before the first step the stages are run once on empty memory, for the shapes
        heard = {name: calls[-BATCH:] for name, calls in heard.items()}
    counts = None
    if deliver != "at the step":
        data = _loader(replicas, 64, setting.get("masked", False))
        counts = [int(next(data)[1].ne(-100).sum()) for _ in range(setting.get("accumulate", 1))]
    if kind == "balance" and deliver != "at the step":  # elsewhere later layers' balance comes in from above
        last = max(before)
        before = {last: before[last]}
    return gathered(times(after[0], after[1], by_hand(kind, before, heard, setting.get("score", softmax), counts), RATE))


SETTINGS: dict[str, dict[str, Any]] = {  # under the default backend, spmd_types, if none is said
    "FSDP2": {},
    "FSDP2, 3 micro-batches": {"accumulate": 3},
    "FSDP2, 3 micro-batches, masked labels": {"accumulate": 3, "masked": True},
    "FSDP2, sigmoid scores": {"score": sigmoid},
    "TP=2, 2 micro-batches": {"tp": 2, "accumulate": 2},
    "PP=2, 2 micro-batches": {"pp": 2},
    "FSDP2, partial_dtensor, 3 micro-batches": {"accumulate": 3, "backend": "partial_dtensor"},
    "TP=2, partial_dtensor, 2 micro-batches": {"tp": 2, "accumulate": 2, "backend": "partial_dtensor"},
    "FSDP2, full_dtensor, 3 micro-batches": {"accumulate": 3, "backend": "full_dtensor"},
    "TP=2, full_dtensor, 2 micro-batches": {"tp": 2, "accumulate": 2, "backend": "full_dtensor"},
    "FSDP2, 12 blocks compiled one by one": {"compile": "aot_eager", "layers": 12},
}


def cases() -> dict[str, Any]:
    return {
        f"{name}; {deliver}; {kind}": partial(measure, deliver, kind, **setting)
        for name, setting in SETTINGS.items()
        for deliver in (("at the step",) if "pp" in setting else ("in the loss", "at the step"))
        for kind in ("penalty", "balance")[: 1 if "compile" in setting else 2]
    }
