"""`surgical` in the loops of others: accumulation, autocast, both checkpointings, compile, Trainer, PEFT."""

import pytest
import torch
from moe_models import BATCH, IDS, Stack, mixtral, tokens
from surgical_checks import OPTIMIZERS, assert_only_path_changed, bits, may_change, steps
from torch import nn

from spectral_router import surgical, wrap_moe

# of other people's modules
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
KINDS = ("sgd_foreach", "adam_fused", "adamw", "adamw_fused")


def warmed(kind: str, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mixtral(**options)
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(lambda: model(**BATCH).loss, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_autocast(kind: str) -> None:
    model, optimizer = warmed(kind)
    before = bits(model, optimizer)
    with surgical(model, BATCH, top=1) as path:
        masks = may_change(model, path)
        for _ in range(2):
            for half in range(2):
                part = {name: value[2 * half : 2 * half + 2] for name, value in BATCH.items()}
                with torch.autocast("cpu", torch.bfloat16):
                    (model(**part).loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_only_path_changed(before, bits(model, optimizer), masks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    model, optimizer = warmed(kind)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = bits(model, optimizer)
    with surgical(model, BATCH, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: model(**BATCH).loss, optimizer, 2)
    after = bits(model, optimizer)
    assert_only_path_changed(before, after, masks)
    plain, other = warmed(kind)
    with surgical(plain, BATCH, top=1):
        steps(lambda: plain(**BATCH).loss, other, 2)
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in bits(plain, other).items())
    for layer in path.layers:  # all layers learn, the first too
        name = f"{layer.gate.removesuffix('.gate')}.experts.down_proj"
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_hand(reentrant: bool) -> None:
    model, x = Stack(reentrant=reentrant), tokens()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps(lambda: model(x).square().mean(), optimizer, 1)
    before = bits(model, optimizer)
    with surgical(model, x, top=2, by="weights") as path:
        masks = may_change(model, path)
        steps(lambda: model(x).square().mean(), optimizer, 2)
    assert_only_path_changed(before, bits(model, optimizer), masks)


@pytest.mark.parametrize("kind", ["sgd_foreach", "adamw_fused"])
def test_compiled(kind: str) -> None:
    model, x = Stack(), tokens()
    optimizer = OPTIMIZERS[kind](model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps(lambda: compiled(x).square().mean(), optimizer, 1)
    before = bits(model, optimizer)
    with surgical(compiled, x, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: compiled(x).square().mean(), optimizer, 2)
    assert_only_path_changed(before, bits(model, optimizer), masks)


def test_compiled_stacked_experts() -> None:
    from distributed_surgical import DIM, Experts, Model

    model, x = Model(Experts), torch.randn(6, DIM)
    optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps(lambda: compiled(x).square().mean(), optimizer, 1)
    before = bits(model, optimizer)
    with surgical(compiled, x, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: compiled(x).square().mean(), optimizer, 2)
    assert_only_path_changed(before, bits(model, optimizer), masks)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_trainer(optim: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model = mixtral()
    handle = wrap_moe(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        learning_rate=1e-2,
        optim=optim,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        bf16=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    before = bits(model)
    with surgical(handle, BATCH, share=0.4) as path:
        masks = may_change(model, path)
        trainer.train()
    assert_only_path_changed(before, bits(model), masks)


@pytest.mark.parametrize(
    "targets", [{"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, {"target_modules": ["q_proj"]}]
)
def test_peft(targets: dict) -> None:
    peft = pytest.importorskip("peft")
    model = mixtral()
    if "target_modules" in targets:
        targets = {**targets, "target_parameters": ["experts.down_proj"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    optimizer = OPTIMIZERS["adamw"](p for p in wrapped.parameters() if p.requires_grad)
    steps(lambda: wrapped(**BATCH).loss, optimizer, 2)
    required = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    before = bits(wrapped, optimizer)
    with surgical(wrapped, BATCH, top=1) as path:
        masks = may_change(wrapped, path)
        assert not any(p.requires_grad and "lora" not in name for name, p in wrapped.named_parameters())
        steps(lambda: wrapped(**BATCH).loss, optimizer, 2)
    after = bits(wrapped, optimizer)
    assert_only_path_changed(before, after, masks)
    assert {
        name.partition(".default")[0][-6:] for name in after if "/" not in name and not torch.equal(before[name], after[name])
    } == {
        "lora_A",
        "lora_B",
    }
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == required


def test_a_frozen_model_is_thawed_on_the_path() -> None:
    model = mixtral().requires_grad_(False)
    before = bits(model)
    with surgical(model, BATCH, top=1) as path:
        masks = may_change(model, path)
        steps(lambda: model(**BATCH).loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 2)
    assert_only_path_changed(before, bits(model), masks)
    assert not any(parameter.requires_grad for parameter in model.parameters())
