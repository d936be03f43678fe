"""DeepSpeed on CPUs: its own engine with ZeRO 0 to 3, its MoE layer with expert parallelism, AutoEP; 2 micro-batches, SGD."""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .measure import Slopes, by_hand, elsewhere, gathered, listening, same, terms, times

HIDDEN, BATCHES = 16, 2


def ready() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    from transformers.utils import output_capturing

    registry: Any = type(output_capturing._CAN_RECORD_REGISTRY)
    plain = registry.get
    # DeepSpeed 0.19.8 asks with a default, which transformers 5.24 does not take
    registry.get = lambda self, key, *default: plain(self, key) if isinstance(key, nn.Module) else dict.get(self, key, *default)


class _Blocks(nn.Module):
    """Two of DeepSpeed's MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.layers = nn.ModuleList(MoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), 4, ep_size=2, k=1, use_rts=False) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)[0]
        return {"loss": x.square().mean()}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(5)
    if kind == "MoE layer":
        return _Blocks()
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        output_router_logits=kind == "AutoEP, logits reported",
        router_aux_loss_coef=0.0,
    )
    return MixtralForCausalLM(config)


def _batches(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    if kind == "MoE layer":
        return [{"x": torch.randn(1, 24, HIDDEN, generator=generator)} for _ in range(BATCHES)]
    ids = [torch.randint(0, 32, (2, 12), generator=generator) for _ in range(BATCHES)]
    return [{"input_ids": x, "labels": x} for x in ids]


def _gates(model: nn.Module) -> dict[str, nn.Module]:
    """The module of each layer whose `weight` is the gate's."""
    found = [
        module
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ds_shape", getattr(getattr(module, "weight", None), "shape", ()))
        == (4, HIDDEN)
        and name.endswith(("gate", "wg"))
    ]
    return {f"layer {number}": module for number, module in enumerate(found)}


def _listened(model: nn.Module) -> dict[str, nn.Module]:
    """Those that are called with the tokens: DeepSpeed's own gate multiplies by the weight of a module that is never called."""
    whole = {id(gate): gate for gate in model.modules() if type(gate).__name__ == "TopKGate"}
    inside = {id(gate.wg): gate for gate in whole.values()}
    return {name: inside.get(id(module), module) for name, module in _gates(model).items()}


def _weights(engine: Any) -> Slopes:
    import deepspeed

    found = {}
    for name, module in _gates(engine.module).items():
        with deepspeed.zero.GatheredParameters([module.weight]):
            found[name] = module.weight.detach().clone()  # type: ignore[operator]
    return found


def measure(kind: str, at_step: bool, term: str, stage: int = 0, after: bool = False) -> dict[str, list[float]] | str:
    """Times for each layer's gate; or what DeepSpeed's optimizer is refused with."""
    import deepspeed

    from spectral_router import wrap_moe

    ended: list[Slopes] = []
    rest = []
    for wrapped in (False, True):
        model = _model(kind)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": BATCHES,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        if kind.startswith("AutoEP"):
            config["expert_parallel"] = {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False}
        handle = wrap_moe(model, **terms(term)) if wrapped and not after else None
        groups: Any = model.parameters()
        if kind == "MoE layer":
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

            groups = split([{"params": list(model.parameters()), "name": "all"}])
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=1.0), config=config)
        before = _weights(engine)
        if wrapped:
            handle = handle or wrap_moe(engine, **terms(term))
            if at_step:
                try:
                    handle.attach(engine.optimizer)
                except TypeError as error:
                    return f"refused: {error}"
        with listening(_listened(engine.module)) as heard:
            for batch in _batches(kind):
                engine.backward(engine(**batch)["loss"])
                engine.step()
        if not wrapped:
            known = heard
        ended.append(_weights(engine))
        rest.append(elsewhere([engine.module], _gates(engine.module)))
        engine.destroy()
    if at_step:
        same(*rest)
    if kind == "AutoEP, logits reported":
        # a gate that is run again on the same tokens, for the report, counts once
        known = {
            name: [call for i, call in enumerate(calls) if not i or not torch.equal(call.tokens, calls[i - 1].tokens)]
            for name, calls in known.items()
        }
    if term == "balance" and not at_step:  # elsewhere the later layer's balance comes in from above
        before = {"layer 1": before["layer 1"]}
    return gathered(times(ended[0], ended[1], by_hand(term, before, known)))


def cases() -> dict[str, Any]:
    found = {}
    for at_step in (False, True):
        for term in ("penalty", "balance"):
            end = f"{'at the step' if at_step else 'in the loss'}; {term}"
            for stage in (0, 1, 2, 3):
                found[f"Mixtral, ZeRO {stage}; {end}"] = partial(measure, "Mixtral", at_step, term, stage)
            for stage in (0, 1, 2):
                found[f"its MoE layer, EP=2, ZeRO {stage}; {end}"] = partial(measure, "MoE layer", at_step, term, stage)
            found[f"AutoEP=2; {end}"] = partial(measure, "AutoEP", at_step, term)
            found[f"AutoEP=2, logits reported; {end}"] = partial(measure, "AutoEP, logits reported", at_step, term)
    return found


warnings.filterwarnings("ignore", module="deepspeed")
