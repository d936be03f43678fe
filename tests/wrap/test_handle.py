"""MoEHandle: the term."""

import math
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from moe_models import BATCH, DIM, EXPERTS, METRICS, Block, Regressor, Stack, mixtral, primed, tokens
from torch import Tensor
from transformers.utils import ModelOutput

from spectral_router import LoadBalanceLoss, SpectralRankPenalty, wrap_moe
from spectral_router.functional import load_balance_loss, spectral_rank_penalty

# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_before_a_training_forward() -> None:
    handle = wrap_moe(Stack())
    with pytest.raises(RuntimeError, match="the last forward was not one in training, with gradients"):
        handle.loss()


def test_loss_twice() -> None:
    model = Stack()
    handle = wrap_moe(model)
    model(tokens())
    handle.loss()
    with pytest.raises(RuntimeError, match="taken by handle"):
        handle.loss()
    model(tokens())
    assert handle.loss() > 0


def test_loss_when_it_is_in_the_model_s_already() -> None:
    model = mixtral()
    handle = wrap_moe(model)
    model(**BATCH)
    with pytest.raises(RuntimeError, match="is in the loss that the model returned"):
        handle.loss()


def test_loss_after_removal() -> None:
    model = Stack()
    handle = wrap_moe(model)
    model(tokens())
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed from its model"):
        handle.loss()


def test_add_to_loss_false_leaves_the_model_s_loss_alone() -> None:
    model = mixtral()
    plain = model(**BATCH).loss
    handle = wrap_moe(model, add_to_loss=False)
    assert torch.equal(model(**BATCH).loss, plain)
    term = handle.loss()
    handle.remove()
    with wrap_moe(model, penalty=handle.penalty):
        torch.testing.assert_close(model(**BATCH).loss, plain + term)


@dataclass
class Output:
    loss: Tensor


@dataclass
class HuggingOutput(ModelOutput):
    loss: Tensor | None = None
    prediction: Tensor | None = None


@dataclass(frozen=True)
class FrozenOutput:
    loss: Tensor


LossAndMore = namedtuple("LossAndMore", ["prediction", "loss"])
KINDS = {
    "dict": lambda loss: {"loss": loss, "prediction": None},
    "ModelOutput": lambda loss: HuggingOutput(loss=loss),
    "dataclass": Output,
    "frozen dataclass": FrozenOutput,
    "namespace": lambda loss: SimpleNamespace(loss=loss),
    "namedtuple": lambda loss: LossAndMore(None, loss),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_that_carries_a_loss(kind: str) -> None:
    class Model(Stack):
        def forward(self, x: Tensor) -> object:
            return KINDS[kind](super().forward(x).square().mean())

    def loss_in(output: object) -> Tensor:
        return output["loss"] if isinstance(output, dict) else output.loss

    model, x = Model(), tokens()
    plain = model(x)
    handle = wrap_moe(model, penalty=None, balance=lambda probs, mask: probs.sum() * 0 + 1.0, balance_coef=0.5)
    output = model(x)
    assert type(output) is type(plain)
    torch.testing.assert_close(loss_in(output), loss_in(plain) + 1.0)
    loss_in(output).backward()
    with pytest.raises(RuntimeError, match="is in the loss"):
        handle.loss()


@pytest.mark.parametrize("output", [lambda loss: (loss,), lambda loss: {"loss": loss.detach()}, lambda loss: {"loss": 1.0}])
def test_output_without_a_loss_that_could_take_the_term(output) -> None:
    class Model(Stack):
        def forward(self, x: Tensor) -> object:
            return output(super().forward(x).square().mean())

    model = Model()
    handle = wrap_moe(model)
    model(tokens())
    assert handle.loss() > 0


# ----------------------------------------------------------------------------------------------------------- the terms


def test_plain_functions_are_penalty_and_balance() -> None:
    seen = []

    def balance(probs: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((probs.shape, mask))
        return probs.square().sum()

    model, x = Stack(), tokens()
    handle = wrap_moe(
        model, penalty=lambda weights: sum(w.abs().sum() for w in weights), balance=balance, penalty_coef=2.0, balance_coef=3.0
    )
    model(x)
    term = handle.loss()
    handle.remove()
    hidden = model.layers[0](x)
    gates = [layer.gate for layer in model.layers]
    probs = [gate(inputs).softmax(-1) for gate, inputs in zip(gates, (x, hidden), strict=True)]
    expected = sum(
        2 * layer.gate.weight.abs().sum() + 3 * p.square().sum() for layer, p in zip(model.layers, probs, strict=True)
    )
    torch.testing.assert_close(term, expected)
    assert seen == [((3, 5, EXPERTS), None)] * 2
    assert set(handle.metrics()["layers.1.gate"]) == set(METRICS)


def test_parts_run_in_full_precision_under_autocast() -> None:
    seen = []
    model = Regressor()
    wrap_moe(model, penalty=lambda weights: seen.append((weights[0] @ weights[0].mT).dtype) or weights[0].sum())
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), torch.zeros(3, 5, DIM))["loss"].backward()
    assert seen == [torch.float32]


@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_masked_out_of_the_balance(positional: bool) -> None:
    masks = []
    model = mixtral()
    wrap_moe(model, balance=lambda probs, mask: masks.append(mask) or load_balance_loss(probs, mask))
    if positional:
        model(BATCH["input_ids"], BATCH["attention_mask"], labels=BATCH["labels"]).loss.backward()
    else:
        model(**BATCH).loss.backward()
    assert all(torch.equal(mask, BATCH["attention_mask"].flatten() == 1) for mask in masks)
    assert len(masks) == 2


@pytest.mark.parametrize("left", ["penalty", "balance", None])
def test_a_part_that_is_none_is_left_out(left: str | None) -> None:
    model, x = Stack(Block()), tokens()
    parts = {"penalty": SpectralRankPenalty(), "balance": LoadBalanceLoss()}
    handle = wrap_moe(model, **{name: part if name == left else None for name, part in parts.items()})
    model(x)
    if left is None:
        with pytest.raises(RuntimeError, match="no term"):
            handle.loss()
    else:
        weight = model.layers[0].gate.weight
        value = spectral_rank_penalty(weight) if left == "penalty" else load_balance_loss((x @ weight.mT).softmax(-1))
        torch.testing.assert_close(handle.loss(), 0.01 * value)
        assert not math.isnan(handle.metrics()["layers.0.gate"]["loss"])


def test_coefficients_may_change_between_steps() -> None:
    model, x = Stack(), tokens()
    handle = wrap_moe(model, penalty=primed([layer.gate.weight for layer in model.layers]))
    terms = []
    for coefs in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        handle.penalty_coef, handle.balance_coef = coefs
        model(x)
        terms.append(handle.loss())
    torch.testing.assert_close(terms[2], 2 * terms[0] + 3 * terms[1])
    assert min(terms) > 0


@pytest.mark.parametrize("name", ["penalty_coef", "balance_coef"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_coefficient_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got {name}={value}"):
        wrap_moe(Stack(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("penalty", 3, '"spread", "hold", "paper" or None, got 3'),
        ("balance", 3, '"default" or None, got 3'),
    ],
)
def test_part_of_the_wrong_kind(name: str, value: object, words: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a callable, {words}"):
        wrap_moe(Stack(), **{name: value})


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match='penalty must be "spread", "hold", "paper", a callable or None, got penalty=\'held\''):
        wrap_moe(Stack(), penalty="held")
