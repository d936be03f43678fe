"""TRL's own trainers, which build the loss themselves: what reaches the gates with MoECallback, less what reaches them without,
is the term's gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from spectral_router import LoadBalanceLoss, MoEHandle, SpectralRankPenalty, wrap_moe
from spectral_router.integrations.transformers import MoECallback

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.slow,
    # TRL's, transformers' and PEFT's own, of no concern here
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*routers:UserWarning"),
]

WORDS = [f"w{number}" for number in range(40)]
STEPS = 3


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + 3 * i) % len(WORDS)] for i in range(length))


def rows(kind: str) -> Dataset:
    numbers = range(24)
    prompts, good, bad = ([text(i + k, 3 + (i + k) % 4) for i in numbers] for k in (0, 5, 11))
    columns = {
        "sft": {"text": [f"{p} {g}" for p, g in zip(prompts, good, strict=True)]},
        "dpo": {"prompt": prompts, "chosen": [" " + g for g in good], "rejected": [" " + b for b in bad]},
        "kto": {"prompt": prompts, "completion": [" " + g for g in good], "label": [i % 2 == 0 for i in numbers]},
        "reward": {"chosen": [f"{p} {g}" for p, g in zip(prompts, good, strict=True)], "rejected": bad},
        "grpo": {"prompt": prompts},
    }
    return Dataset.from_dict(columns["grpo" if kind == "rloo" else kind])


def length_of(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(word in completion for word in WORDS[:20])) for completion in completions]


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = MixtralForSequenceClassification if kind == "reward" else MixtralForCausalLM
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_labels": 1} if kind == "reward" else {}
    config = MixtralConfig(
        vocab_size=64,
        num_key_value_heads=1,
        num_local_experts=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        **sizes,
        **more,
    )
    return made(config)


def trainer(kind: str, net: nn.Module, accumulation: int, folder: str, callbacks: list[TrainerCallback]) -> Trainer:
    prefix = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}[kind]
    sampled = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0} if kind in ("grpo", "rloo") else {}
    settings = getattr(trl, f"{prefix}Config")(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=0.0,  # so that the runs with and without the term stay comparable
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        seed=1,
        **sampled,
    )
    more: dict[str, Any] = {"reward_funcs": length_of} if sampled else {}
    if kind in ("dpo", "kto") and not hasattr(net, "peft_config"):  # else it would look for one by name
        more["ref_model"] = model(kind)
    return getattr(trl, f"{prefix}Trainer")(
        model=net, args=settings, train_dataset=rows(kind), processing_class=tokenizer(), callbacks=callbacks, **more
    )


class Spy(TrainerCallback):
    """The gates' gradients at each step."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.steps.append({n: p.grad.clone() for n, p in self.net.named_parameters() if ".gate." in n and p.grad is not None})


class ByHand(TrainerCallback):
    """The term's gradient at each step, of what the hooks of this class have seen of an unwrapped model."""

    def __init__(self, net: nn.Module, effective: Callable[[nn.Module], Tensor]) -> None:
        self.net, self.effective = net, effective
        self.gates = [module for name, module in net.named_modules() if name.endswith(".mlp.gate")]
        self.counts = False
        self.forwards: list[tuple[list[Tensor], Tensor | None]] = []
        self.steps: list[dict[str, Tensor]] = []
        net.register_forward_pre_hook(self.begins, with_kwargs=True)
        for gate in self.gates:
            gate.register_forward_pre_hook(self.at_gate)

    def begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.counts = module.training and torch.is_grad_enabled()
        if self.counts:
            self.forwards.append(([], kwargs.get("attention_mask")))

    def at_gate(self, gate: nn.Module, args: tuple[Tensor, ...]) -> None:
        # what runs in a backward is a recomputation; a generation may go past the PEFT model
        if self.counts and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self.forwards[-1][0].append(args[0].detach().reshape(-1, 16))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        weights = [self.effective(gate) for gate in self.gates]
        total = ALPHA * SpectralRankPenalty(TARGET)(weights)
        for inputs, mask in self.forwards:
            assert len(inputs) == len(weights)
            for x, weight in zip(inputs, weights, strict=True):
                kept = mask.flatten() if mask is not None and mask.numel() == len(x) else None
                total = total + BETA / len(self.forwards) * LoadBalanceLoss()((x @ weight.mT).softmax(-1), kept)
        learning = {n: p for n, p in self.net.named_parameters() if ".gate." in n and p.requires_grad}
        self.steps.append(dict(zip(learning, torch.autograd.grad(total, list(learning.values())), strict=True)))
        self.forwards = []


ALPHA, BETA, TARGET = 0.5, 0.3, 2.0


def plain(gate: nn.Module) -> Tensor:
    return gate.weight


def with_lora(gate: nn.Module) -> Tensor:
    return gate.base_layer.weight + 1.5 * gate.lora_B["default"].weight @ gate.lora_A["default"].weight


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_the_gates_get_the_gradient_of_the_term(kind: str, lora: bool, accumulation: int, tmp_path) -> None:
    def made() -> nn.Module:
        net = model(kind)
        if not lora:
            return net
        torch.manual_seed(1)
        task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
        config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["gate"], task_type=task)
        return get_peft_model(net, config)

    bare = made()
    by_hand, before = ByHand(bare, with_lora if lora else plain), Spy(bare)
    trainer(kind, bare, accumulation, str(tmp_path), [by_hand, before]).train()

    net = made()
    handle = wrap_moe(net, penalty=SpectralRankPenalty(TARGET), penalty_coef=ALPHA, balance_coef=BETA)
    after = Spy(net)
    trainer(kind, net, accumulation, str(tmp_path), [after, MoECallback()]).train()

    assert len(after.steps) == len(before.steps) == STEPS
    for wrapped, unwrapped, expected in zip(after.steps, before.steps, by_hand.steps, strict=True):
        assert wrapped.keys() == unwrapped.keys() == expected.keys()
        assert len(wrapped) == (4 if lora else 2)
        for name, term in expected.items():
            assert term.norm() > 1e-3
            torch.testing.assert_close(wrapped[name] - unwrapped[name], term, rtol=1e-4, atol=1e-5)
    assert MoEHandle.of(net) is handle
    assert handle.at_step is None  # another loop may use the model's loss
