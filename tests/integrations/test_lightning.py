"""Lightning's Trainer on a wrapped model, under both of the names that it is published with."""

import csv
import importlib
import sys
from types import ModuleType

import pytest
import torch
from moe_models import Stack, assert_same_gradients, gradients, mixtral, mixtral_gates, primed, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_router import SpectralRankPenalty, wrap_moe
from spectral_router.functional import load_balance_loss
from spectral_router.integrations import router_metrics

COEFS = {"penalty_coef": 0.5, "balance_coef": 0.3}

pytestmark = [
    # Lightning's own: under torch 2.15, and of a loader that is good enough for a test
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The .\w+_dataloader. does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def lit() -> ModuleType:
    return importlib.import_module("lightning_parts")


# ------------------------------------------------------------------------------------------------------------- the term


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_first_step_is_the_one_written_by_hand(tmp_path, accumulation: int, lit) -> None:
    by_hand = mixtral()
    weights = [gate.weight for gate in mixtral_gates(by_hand)]
    penalty = primed(weights)
    for index, batch in enumerate(lit.data()):
        if index < accumulation:
            output = by_hand(**batch, output_router_logits=True)
            balance = sum(load_balance_loss(logits.softmax(-1)) for logits in output.router_logits)
            ((output.loss + 0.5 * penalty(weights) + 0.3 * balance) / accumulation).backward()

    model, spy = mixtral(), lit.Spy()
    wrap_moe(model, penalty=primed(weights), **COEFS)
    lit.trainer(tmp_path, spy, max_steps=1, accumulate_grad_batches=accumulation).fit(lit.Language(model), lit.data())
    assert_same_gradients(spy.gradients, gradients(by_hand))


def test_a_step_may_add_the_term_itself(tmp_path, lit) -> None:
    class Regression(lit.Language):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean() + self.handle.loss()

    batch = tokens().detach()
    by_hand, model, spy = Stack(), Stack(), lit.Spy()
    model.load_state_dict(by_hand.state_dict())
    weights = [layer.gate.weight for layer in by_hand.layers]
    probs = []
    for layer in by_hand.layers:
        layer.gate.register_forward_hook(lambda _module, _args, logits: probs.append(logits.softmax(-1)))
    task = by_hand(batch).square().mean()
    (task + 0.5 * primed(weights)(weights) + 0.3 * sum(load_balance_loss(p) for p in probs)).backward()

    module = Regression(model)
    module.handle = wrap_moe(model, penalty=primed(weights), **COEFS)
    lit.trainer(tmp_path, spy, max_steps=1).fit(module, DataLoader([batch], batch_size=None))
    assert_same_gradients(spy.gradients, gradients(by_hand))


# ------------------------------------------------------------------------------------------------------------------ logs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_metrics_are_logged_at_the_interval(tmp_path, accumulation: int, lit) -> None:
    model, logger = mixtral(), lit.CSVLogger(tmp_path)
    handle = wrap_moe(model)
    options = {"log_every_n_steps": 2, "max_steps": 5, "accumulate_grad_batches": accumulation}
    made = lit.trainer(tmp_path, lit.MoECallback(per_gate=True), logger=logger, **options)
    made.fit(lit.Language(model), lit.data(24))
    report = router_metrics(handle, per_gate=True)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = list(csv.DictReader(file))
    assert [entry["step"] for entry in logged] == ["1", "3"]
    assert all(entry[key] for key in ("loss", *report) for entry in logged)
    assert logged[0]["router/stable_rank"] != logged[1]["router/stable_rank"]


def test_metrics_are_read_at_logging_steps_only(tmp_path, monkeypatch, lit) -> None:
    model, calls = mixtral(), []
    handle = wrap_moe(model)
    metrics = handle.metrics
    monkeypatch.setattr(handle, "metrics", lambda: calls.append(1) or metrics())
    lit.trainer(tmp_path, lit.MoECallback(handle), log_every_n_steps=3, max_steps=6).fit(lit.Language(model), lit.data(24))
    assert len(calls) == 2


def test_a_module_with_nothing_wrapped_is_an_error(tmp_path, lit) -> None:
    with pytest.raises(ValueError, match=r"no model in Language is wrapped; call wrap_moe\(model\) first"):
        lit.trainer(tmp_path, lit.MoECallback()).fit(lit.Language(mixtral()), lit.data())


# ----------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("solver", ["exact", "power"])
def test_resuming_goes_on_bit_for_bit(tmp_path, solver: str, lit) -> None:
    def run(epochs: int, checkpoint=None):
        model = mixtral()
        if checkpoint is not None:
            with torch.no_grad():  # anchors taken before the checkpoint's weights are in would be others
                for gate in mixtral_gates(model):
                    gate.weight.mul_(3)
        handle = wrap_moe(model, penalty=SpectralRankPenalty("initial", relative=True, solver=solver), **COEFS)
        saver = lit.ModelCheckpoint(tmp_path, save_top_k=-1)  # as each epoch ends
        made = lit.trainer(tmp_path, lit.MoECallback(), saver, max_steps=-1, max_epochs=epochs, enable_checkpointing=True)
        made.fit(lit.Language(model), lit.data(6), ckpt_path=checkpoint)
        return model, handle, saver.best_model_path

    _, stopped, checkpoint = run(1)
    resumed, handle, _ = run(2, checkpoint)
    straight, reference, _ = run(2)
    assert torch.equal(handle.penalty.anchor, stopped.penalty.anchor)
    assert torch.equal(handle.penalty.anchor, reference.penalty.anchor)
    for (name, parameter), expected in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_a_model_made_in_configure_model_is_restored_too(tmp_path, lit) -> None:
    class Late(lit.Language):
        def __init__(self) -> None:
            super().__init__(None)

        def configure_model(self) -> None:
            if self.model is None:
                self.model = mixtral()
                self.handle = wrap_moe(self.model)

    made = lit.trainer(tmp_path, lit.MoECallback(), max_steps=2)
    first = Late()
    made.fit(first, lit.data(4))
    made.save_checkpoint(tmp_path / "two.ckpt")
    second = Late()
    lit.trainer(tmp_path, lit.MoECallback(), max_steps=4).fit(second, lit.data(4), ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(second.handle.penalty.anchor, first.handle.penalty.anchor)


def test_a_checkpoint_without_the_state_warns(tmp_path, lit) -> None:
    wrap_moe(model := mixtral())
    made = lit.trainer(tmp_path, max_steps=2)
    made.fit(lit.Language(model), lit.data(4))
    made.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint holds no state of the routers' objective"):
        lit.trainer(tmp_path, lit.MoECallback(), max_steps=4).fit(
            lit.Language(model), lit.data(4), ckpt_path=tmp_path / "two.ckpt"
        )


def test_a_checkpoint_of_other_gates_is_an_error(tmp_path, lit) -> None:
    handle = wrap_moe(model := mixtral())
    made = lit.trainer(tmp_path, lit.MoECallback(), max_steps=2)
    made.fit(lit.Language(model), lit.data(4))
    made.save_checkpoint(tmp_path / "two.ckpt")
    handle.remove()
    wrap_moe(model, gates="layers.0.mlp.gate")
    with pytest.raises(ValueError, match=r"the state is of other gates.*layers\.1\.mlp\.gate"):
        lit.trainer(tmp_path, lit.MoECallback(), max_steps=4).fit(
            lit.Language(model), lit.data(4), ckpt_path=tmp_path / "two.ckpt"
        )


# ------------------------------------------------------------------------------------------------------------- two names


def test_pytorch_lightning_too(tmp_path, monkeypatch, lit) -> None:
    other = pytest.importorskip("pytorch_lightning")
    # as in a program that has imported no other
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(sys.modules, "spectral_router.integrations.lightning")
    callback = importlib.import_module("spectral_router.integrations.lightning").MoECallback
    assert issubclass(callback, other.Callback)

    class Module(other.LightningModule):
        training_step, configure_optimizers = lit.Language.training_step, lit.Language.configure_optimizers

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    # also one that was made for the other name, as where both are in use
    for made_for in (callback, lit.MoECallback):
        handle = wrap_moe(model := mixtral())
        made = lit.trainer(tmp_path, made_for(handle), kind=other.Trainer, max_steps=2)
        made.fit(Module(model), lit.data(4))
        assert set(router_metrics(handle)) <= set(made.callback_metrics)
        made.save_checkpoint(tmp_path / "two.ckpt")
        again = wrap_moe(later := mixtral())
        made = lit.trainer(tmp_path, made_for(again), kind=other.Trainer, max_steps=4)
        made.fit(Module(later), lit.data(4), ckpt_path=tmp_path / "two.ckpt")
        assert torch.equal(again.penalty.anchor, handle.penalty.anchor)
