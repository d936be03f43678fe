"""Gates at a rate of their own: every parameter in one group, the gates' in theirs, whoever makes the optimizer's schedule."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spectral_router import Gate, find_gates, gate_param_groups, wrap_moe

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        p = self.router(x).softmax(-1)
        return self.norm(sum(w * expert(x) for w, expert in zip(p.split(1, -1), self.experts, strict=True)))


class Raw(nn.Module):
    """The gate is a parameter of the block, beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.ones(6))
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        p = (x @ self.w_gate).softmax(-1)
        return self.scale * sum(w * expert(x) for w, expert in zip(p.split(1, -1), self.experts, strict=True))


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_each_parameter_is_in_one_group_and_the_gates_are_apart():
    model = MoE()
    groups = by_name(gate_param_groups(model, 1e-2, gate_lr_scale=0.1))
    assert groups["gates"]["params"] == [model.router.weight, model.router.bias] or {
        id(p) for p in groups["gates"]["params"]
    } == {id(model.router.weight), id(model.router.bias)}
    assert (groups["gates"]["lr"], groups["others"]["lr"]) == (pytest.approx(1e-3), 1e-2)
    assert all("weight_decay" not in group for group in groups.values())
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    "model",
    [
        GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, intermediate_size=8, head_dim=8)),
        DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **SMALL,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                intermediate_size=8,
                moe_intermediate_size=8,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            )
        ),
    ],
    ids=["gpt_oss", "deepseek_v3"],
)
def test_of_real_models_the_gates_weights_and_biases(model):
    groups = by_name(gate_param_groups(model, 1e-2, weight_decay=0.1, gate_weight_decay=0.0))
    wanted = {id(p) for gate in find_gates(model) for p in gate.module.parameters()}
    assert wanted
    assert {id(p) for p in groups["gates"]["params"]} == wanted
    assert groups["gates"]["weight_decay"] == 0.0
    assert groups["vectors"]["weight_decay"] == 0.0
    assert all(p.ndim < 2 for p in groups["vectors"]["params"])
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def test_a_raw_parameter_leaves_its_block_to_the_others():
    model = Raw()
    gates = Gate("", model, 4, parameter="w_gate", transposed=True)
    groups = by_name(gate_param_groups(model, 1e-2, gates=gates))
    assert [p is model.w_gate for p in groups["gates"]["params"]] == [True]
    assert any(p is model.scale for p in groups["others"]["params"])


def test_lora_on_a_gate_is_what_learns():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(MoE(), peft.LoraConfig(r=2, target_modules=["router"]))
    groups = by_name(gate_param_groups(model, 1e-2))
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)].split(".")[-3] for p in groups["gates"]["params"]) == ["lora_A", "lora_B"]
    assert "others" not in groups  # what does not learn is in none


def test_a_frozen_gate_and_a_slower_one():
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    moved = {}
    for scale in (0.0, 0.1, 1.0):
        torch.manual_seed(1)
        model = MoE()
        before = model.router.weight.detach().clone()
        optimizer = torch.optim.Adam(gate_param_groups(model, 1e-2, gate_lr_scale=scale))
        model(x).square().sum().backward()
        optimizer.step()
        moved[scale] = (model.router.weight - before).abs().max().item()
    assert moved[0.0] == 0
    assert moved[0.1] == pytest.approx(0.1 * moved[1.0], rel=1e-3)


def test_the_schedule_of_trainer_scales_both(tmp_path):
    class Regression(MoE):
        def forward(self, x, labels=None):
            return {"loss": (super().forward(x) - labels).square().mean()}

    model = Regression()
    handle = wrap_moe(model)
    optimizer = torch.optim.AdamW(gate_param_groups(model, 1e-2, gate_lr_scale=0.1))
    data = [{"x": torch.randn(6), "labels": torch.randn(6)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none", lr_scheduler_type="linear",
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    rates = []
    trainer.add_callback(rates_at_each_step(optimizer, rates))
    trainer.train()
    handle.remove()
    assert [gate / other for other, gate in rates[:-1]] == [pytest.approx(0.1)] * 3
    assert rates[0][0] > rates[1][0] > rates[2][0]


def rates_at_each_step(optimizer, rates):
    class Rates(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            rates.append([group["lr"] for group in sorted(optimizer.param_groups, key=lambda g: g["name"] == "gates")])

    return Rates()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0}, "lr must be a finite number above 0, got lr=0"),
        ({"gate_lr_scale": -1}, "gate_lr_scale must be a finite number of at least 0, got gate_lr_scale=-1"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0 or None, got weight_decay=-0.1"),
        ({"gate_weight_decay": float("inf")}, "gate_weight_decay must be a finite number"),
    ],
)
def test_bad_numbers(changed, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        gate_param_groups(MoE(), **{"lr": 1e-3, **changed})


def test_gates_that_do_not_learn():
    model = MoE()
    model.router.requires_grad_(False)
    with pytest.raises(ValueError, match="the gates must have a parameter that learns, got none"):
        gate_param_groups(model, 1e-3)
