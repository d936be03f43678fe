"""transformers' Trainer on a wrapped model: gradients of its own loop, logs, checkpoints."""

import functools
import json
import math

import pytest
import torch
from moe_models import assert_same_gradients, gradients, mixtral, mixtral_gates, primed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from spectral_router import SpectralRankPenalty, wrap_moe
from spectral_router.functional import load_balance_loss
from spectral_router.integrations import router_metrics
from spectral_router.integrations.transformers import MoECallback

pytestmark = pytest.mark.slow

ALPHA, BETA = 0.5, 0.3
SAVING = {"save_strategy": "steps", "save_steps": 1}
COEFS = {"penalty_coef": ALPHA, "balance_coef": BETA}
NAMES = [f"model.layers.{i}.mlp.gate" for i in (0, 1)]
ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 4])
CHECKPOINTING = pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non-reentrant", "reentrant"])


class Spy(TrainerCallback):
    """Gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: gradient.clone() for name, gradient in gradients(model).items()}


@functools.cache
def rows() -> list[dict[str, Tensor]]:
    """Rows of very unequal length, so that the micro-batches of a step hold unequal numbers of target tokens."""
    ids = torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(3))
    masks = torch.stack([torch.arange(12) < 2 + 5 * row % 11 for row in range(16)]).long()
    columns = {"input_ids": ids, "attention_mask": masks, "labels": ids.masked_fill(masks == 0, -100)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def trainer(model, folder, *callbacks: TrainerCallback, reentrant: bool | None = None, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "activation_checkpointing": reentrant is not None,
        "activation_checkpointing_kwargs": {"use_reentrant": bool(reentrant)},
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))


def training_logs(made: Trainer) -> list[dict[str, float]]:
    return [entry for entry in made.state.log_history if "loss" in entry]


# -------------------------------------------------------------------------------------------------- the term in the loss


@functools.cache
def first_step_by_hand(accumulation: int) -> tuple[dict[str, Tensor], float, float]:
    """Gradients, task loss and term of a step over `accumulation` micro-batches: means over its target tokens."""
    model = mixtral()
    weights = [gate.weight for gate in mixtral_gates(model)]
    penalty, task, term = primed(weights), torch.zeros(()), torch.zeros(())
    batches = [
        {key: torch.stack([row[key] for row in rows()[2 * i : 2 * i + 2]]) for key in rows()[0]} for i in range(accumulation)
    ]
    targets = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    assert accumulation == 1 or max(targets) > 1.5 * min(targets)
    for batch, count in zip(batches, targets, strict=True):
        output = model(**batch, output_router_logits=True)
        mask = batch["attention_mask"].flatten()
        balance = sum(load_balance_loss(logits.softmax(-1), mask) for logits in output.router_logits)
        task = task + output.loss * count / sum(targets)
        term = term + (ALPHA * penalty(weights) + BETA * balance) * count / sum(targets)
    (task + term).backward()
    return gradients(model), task.item(), term.item()


@ACCUMULATION
@CHECKPOINTING
def test_the_first_step_is_the_one_written_by_hand(tmp_path, reentrant: bool | None, accumulation: int) -> None:
    expected, task, term = first_step_by_hand(accumulation)
    model, spy = mixtral(), Spy()
    wrap_moe(model, penalty=primed([gate.weight for gate in mixtral_gates(model)]), **COEFS)
    made = trainer(model, tmp_path, spy, reentrant=reentrant, gradient_accumulation_steps=accumulation)
    made.train()
    assert_same_gradients(spy.gradients, expected)
    assert training_logs(made)[0]["loss"] == pytest.approx(task + term, rel=1e-5)

    plain = trainer(mixtral(), tmp_path, gradient_accumulation_steps=accumulation)
    plain.train()
    assert training_logs(made)[0]["loss"] - training_logs(plain)[0]["loss"] == pytest.approx(term, rel=1e-4)


def test_training_with_the_term_keeps_the_rank_up(tmp_path) -> None:
    ranks = []
    for coefficient in (0.0, 1.0):
        model = mixtral()
        handle = wrap_moe(model, penalty_coef=coefficient, balance=None)
        trainer(model, tmp_path, max_steps=30).train()
        ranks.append(sum(row["stable_rank"] for row in handle.metrics().values()) / 2)
    assert ranks[1] > ranks[0] + 0.5


def test_label_smoothing_leaves_the_term_out_and_says_so(tmp_path) -> None:
    wrap_moe(model := mixtral())
    with pytest.warns(UserWarning, match=r"the loop \(trainer\) builds its own loss. Deliver at the step"):
        trainer(model, tmp_path, label_smoothing_factor=0.1, max_steps=2).train()


# ------------------------------------------------------------------------------------------------------------------ logs


def test_metrics_are_in_every_training_log_and_no_other(tmp_path) -> None:
    handle = wrap_moe(model := mixtral(), **COEFS)
    made = trainer(model, tmp_path, MoECallback(per_gate=True), max_steps=4, logging_steps=2)
    made.train()
    made.eval_dataset = rows()[:2]
    made.evaluate()
    report = router_metrics(handle, per_gate=True)
    assert [entry["step"] for entry in made.state.log_history] == [2, 4, 4, 4]
    assert [set(report) <= set(entry) for entry in made.state.log_history] == [True, True, False, False]
    assert {key: made.state.log_history[1][key] for key in report} == pytest.approx(report, nan_ok=True)


def test_the_aggregates_of_two_gates(monkeypatch) -> None:
    handle = wrap_moe(mixtral())
    keys = ("sigma_max", "stable_rank", "penalty", "balance", "entropy", "max_share", "dead", "loss")
    rows = {name: dict(zip(keys, range(start, start + 8), strict=True)) for name, start in zip(NAMES, (1, 11), strict=True)}
    monkeypatch.setattr(handle, "metrics", lambda: rows)
    expected = {"loss": 8 + 18, "dead": 7 + 17, "penalty": 8, "balance": 9, "sigma_max": 6, "stable_rank": 7, "entropy": 10}
    aggregates = {f"router/{name}": value for name, value in (expected | {"stable_rank_min": 2, "max_share": 16}).items()}
    assert router_metrics(handle) == aggregates
    each = {f"router/{gate}/{name}": value for gate, row in rows.items() for name, value in row.items()}
    assert router_metrics(handle, per_gate=True) == aggregates | each


def test_a_frozen_gate_does_not_hide_the_others(tmp_path) -> None:
    wrap_moe(model := mixtral())
    mixtral_gates(model)[0].weight.requires_grad_(False)
    made = trainer(model, tmp_path, MoECallback(per_gate=True))
    with pytest.warns(UserWarning, match="frozen gates are left alone"):
        made.train()
    (log,) = training_logs(made)
    assert math.isnan(log[f"router/{NAMES[0]}/balance"])
    assert log["router/balance"] == log[f"router/{NAMES[1]}/balance"] > 0
    assert math.isfinite(log["router/loss"])


@pytest.mark.parametrize("added_later", [False, True])
def test_reporters_see_the_metrics(tmp_path, monkeypatch, added_later: bool) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = mixtral()
    callback = MoECallback(wrap_moe(model))
    made = trainer(model, tmp_path, *([] if added_later else [callback]), report_to="tensorboard", max_steps=2)
    if added_later:
        made.add_callback(callback)
    made.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    logged = [entry["router/stable_rank"] for entry in training_logs(made)]
    assert [event.value for event in board.Scalars("train/router/stable_rank")] == pytest.approx(logged)


def test_each_callback_begins_training_once(tmp_path) -> None:
    """Although MoECallback moves itself to the front of the list while Trainer goes through it."""
    seen = []

    class Other(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(self)

    wrap_moe(model := mixtral())
    others = [Other(), Other()]
    trainer(model, tmp_path, others[0], MoECallback(), others[1]).train()
    assert seen == others


def test_a_model_that_is_not_wrapped_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the Trainer's model is not wrapped; call wrap_moe\(model\) first"):
        trainer(mixtral(), tmp_path, MoECallback()).train()


# ----------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_resuming_goes_on_bit_for_bit(tmp_path, solver: str, restore_callbacks: bool) -> None:
    def run(model, folder: str, **options):
        handle = wrap_moe(model, penalty=SpectralRankPenalty("initial", relative=True, solver=solver), **COEFS)
        options["restore_callback_states_from_checkpoint"] = restore_callbacks
        # a callback that is made anew must find the handle
        return handle, trainer(model, tmp_path / folder, MoECallback(None if restore_callbacks else handle), **options)

    straight = mixtral()
    reference, made = run(straight, "straight", max_steps=6)
    made.train()
    stopped, made = run(mixtral(), "stopped", max_steps=3, save_strategy="steps", save_steps=3)
    made.train()
    # in another folder than the one that is written to, as after a move
    checkpoint = (tmp_path / "stopped" / "checkpoint-3").rename(tmp_path / "moved")
    # Trainer does not load experts and gates into a model (huggingface/transformers#48805), so they are in it before
    resumed = MixtralForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    anew = SpectralRankPenalty("initial")
    anew([gate.weight for gate in mixtral_gates(resumed)])
    assert ((anew.anchor - stopped.penalty.anchor).abs() > 1e-3).all()  # else this would pass without any state
    handle, made = run(resumed, "resumed", max_steps=6)
    made.train(resume_from_checkpoint=str(checkpoint))

    assert torch.equal(handle.penalty.anchor, stopped.penalty.anchor)
    assert torch.equal(handle.penalty.anchor, reference.penalty.anchor)
    for (name, parameter), expected in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert training_logs(made)[-1]["router/loss"] == router_metrics(reference)["router/loss"]


def test_a_checkpoint_without_the_state_warns(tmp_path) -> None:
    wrap_moe(model := mixtral())
    trainer(model, tmp_path, **SAVING).train()
    with pytest.warns(UserWarning, match="the checkpoint holds no state of the routers' objective"):
        trainer(model, tmp_path, MoECallback(), **{**SAVING, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert "MoECallback" in (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()


def test_a_checkpoint_of_other_gates_is_an_error(tmp_path) -> None:
    wrap_moe(model := mixtral())
    trainer(model, tmp_path, MoECallback(), **SAVING).train()
    wrap_moe(again := mixtral(), gates="layers.0.mlp.gate")
    with pytest.raises(ValueError, match=r"the state is of other gates.*layers\.1\.mlp\.gate"):
        trainer(again, tmp_path, MoECallback(), max_steps=2).train(resume_from_checkpoint=True)


def test_the_checkpoint_is_plain_json(tmp_path) -> None:
    handle = wrap_moe(model := mixtral())
    trainer(model, tmp_path, MoECallback(handle), **SAVING).train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["stateful_callbacks"]["MoECallback"]
    saved = state["attributes"]["saved"]
    assert saved["gates"] == {name: [8, 16] for name in NAMES}
    assert saved["penalty"]["anchor"] == {"dtype": "float32", "values": handle.penalty.anchor.tolist()}
