"""MoEHandle: the term, the measurements, the state, the table."""

import copy
import io
import math
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from moe_models import BATCH, DIM, EXPERTS, Block, Regressor, Stack, gradients, mixtral, mixtral_gates, primed, tokens
from torch import Tensor, nn
from transformers.utils import ModelOutput

from spectral_router import LoadBalanceLoss, MoEHandle, SpectralRankPenalty, wrap_moe
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
    with pytest.raises(RuntimeError, match="no term"):
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


@pytest.mark.parametrize("name", ["penalty", "balance"])
def test_part_of_the_wrong_kind(name: str) -> None:
    with pytest.raises(TypeError, match=f'{name} must be a callable, "default" or None, got 3'):
        wrap_moe(Stack(), **{name: 3})


# -------------------------------------------------------------------------------------------------------- measurements

METRICS = ("sigma_max", "stable_rank", "penalty", "balance", "entropy", "max_share", "dead", "loss")


def test_metrics_by_hand() -> None:
    model = mixtral()
    with torch.no_grad():  # somebody else is always far more probable than the last expert of the first gate
        mixtral_gates(model)[0].weight *= 20
        mixtral_gates(model)[0].weight[-1] = 0
    handle = wrap_moe(model, penalty=SpectralRankPenalty(1.5, relative=True), penalty_coef=0.5, balance_coef=0.3)
    before = handle.metrics()
    for row in before.values():
        assert [name for name in METRICS if math.isnan(row[name])] == ["balance", "entropy", "max_share", "dead", "loss"]
    output = model(**BATCH, output_router_logits=True)
    mask = BATCH["attention_mask"].flatten() == 1
    found = handle.metrics()
    assert list(found) == [gate.name for gate in handle.gates]
    assert found["model.layers.0.mlp.gate"]["dead"] > 0
    for row, logits, gate in zip(found.values(), output.router_logits, mixtral_gates(model), strict=True):
        singular, share = torch.linalg.svdvals(gate.weight.double()), logits[mask].double().softmax(-1).mean(0)
        penalty = spectral_rank_penalty(gate.weight, 1.5, relative=True).item()
        balance = (share.var(correction=0) / share.mean() ** 2).item()
        assert tuple(row) == METRICS
        assert all(type(value) is float for value in row.values())
        assert row == pytest.approx(
            {
                "sigma_max": singular[0].item(),
                "stable_rank": (singular.square().sum() / singular[0] ** 2).item(),
                "penalty": penalty,
                "balance": balance,
                "entropy": (-share.xlogy(share).sum() / math.log(8)).item(),
                "max_share": share.max().item(),
                "dead": float((share < 0.01 / 8).sum()),
                "loss": 0.5 * penalty + 0.3 * balance,
            },
            rel=1e-4,
        )


def test_losses_of_the_gates_add_up_to_the_term() -> None:
    model = mixtral()
    handle = wrap_moe(model, add_to_loss=False)
    model(**BATCH)
    assert sum(row["loss"] for row in handle.metrics().values()) == pytest.approx(handle.loss().item(), rel=1e-5)


def test_metrics_leave_the_next_step_alone() -> None:
    found = []
    for looks in (0, 3):
        model = mixtral()
        handle = wrap_moe(model, penalty=SpectralRankPenalty("initial", solver="power"), penalty_coef=1.0)
        model(**BATCH).loss.backward()
        for _ in range(looks):
            handle.metrics()
        model(**BATCH).loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_table() -> None:
    handle = wrap_moe(mixtral(), penalty_coef=0.5, balance=None)
    head, titles, *rows = repr(handle).splitlines()
    assert head.startswith("MixtralForCausalLM: 0.5 x SpectralRankPenalty(")
    assert "LoadBalanceLoss" not in head
    assert titles.split("  ")[0] == "gate"
    assert [row.split() for row in rows] == [
        [f"model.layers.{i}.mlp.gate", "MixtralTopKRouter", "8", "x", "16", "softmax", "output[0]:", "logits"] for i in (0, 1)
    ]
    assert "nothing added" in repr(wrap_moe(Stack(), penalty=None, balance=None))


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("solver", ["exact", "power"])
def test_a_resumed_run_takes_the_same_next_step(solver: str) -> None:
    def wrapped(model: nn.Module) -> tuple[MoEHandle, torch.optim.Optimizer]:
        penalty = SpectralRankPenalty("initial", solver=solver, relative=True)
        return wrap_moe(model, penalty=penalty, penalty_coef=1.0), torch.optim.SGD(model.parameters(), lr=0.5)

    model = mixtral()
    handle, optimizer = wrapped(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    file, resumed = io.BytesIO(), mixtral()
    torch.save((model.state_dict(), handle.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model(**BATCH).loss.backward()

    resumed.load_state_dict(weights)
    own, _ = wrapped(resumed)
    fresh = copy.deepcopy(resumed)
    own.load_state_dict(state)
    for each in (resumed, fresh):
        each(**BATCH).loss.backward()
    assert all(torch.equal(gradient, gradients(resumed)[name]) for name, gradient in gradients(model).items())
    assert not all(torch.equal(gradient, gradients(fresh)[name]) for name, gradient in gradients(model).items())


def test_state_can_be_loaded_over_a_run_that_has_begun() -> None:
    models = [mixtral(), mixtral()]
    handles = [wrap_moe(model) for model in models]
    for factor, model in enumerate(models, 1):
        with torch.no_grad():
            mixtral_gates(model)[0].weight.mul_(factor)
        model(**BATCH).loss.backward()
    assert not torch.equal(handles[0].penalty.anchor, handles[1].penalty.anchor)
    handles[1].load_state_dict(handles[0].state_dict())
    assert torch.equal(handles[0].penalty.anchor, handles[1].penalty.anchor)
    assert handles[0].penalty.anchor is not handles[1].penalty.anchor


def test_state_is_a_snapshot() -> None:
    model = Regressor()
    handle = wrap_moe(model, penalty=SpectralRankPenalty(solver="power"))
    model(tokens(), torch.zeros(3, 5, DIM))["loss"].backward()
    state = handle.state_dict()
    kept = copy.deepcopy(state)
    with torch.no_grad():
        model.layers[0].gate.weight.normal_()
    model(tokens(), torch.zeros(3, 5, DIM))["loss"].backward()
    assert all(torch.equal(state["penalty"][name], tensor) for name, tensor in kept["penalty"].items())


@pytest.mark.parametrize("options", [{"num_hidden_layers": 1}, {"num_local_experts": 4}])
def test_state_of_other_gates(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"other gates.*differ in model\.layers\..\.mlp\.gate"):
        wrap_moe(mixtral()).load_state_dict(wrap_moe(mixtral(**options)).state_dict())


@pytest.mark.parametrize("part", [None, lambda weights: sum(weight.sum() for weight in weights)], ids=["none", "function"])
def test_state_where_a_part_has_none(part) -> None:
    handle = wrap_moe(Stack(), penalty=part, balance=None)
    assert handle.state_dict()["penalty"] == {}
    handle.load_state_dict(handle.state_dict())


def test_a_loss_for_each_sample_is_left_alone() -> None:
    class PerSample(Stack):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x).square().flatten(1).mean(1)}

    torch.manual_seed(0)
    model, x = PerSample(), torch.randn(3, 5, DIM)
    plain = model(x)["loss"].detach()
    handle = wrap_moe(model)
    torch.testing.assert_close(model(x)["loss"], plain)
    assert handle.loss().ndim == 0


def test_all_gates_frozen_for_a_while() -> None:
    model, x = Stack(), tokens()
    handle = wrap_moe(model)
    for layer in model.layers:
        layer.gate.requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen gates"):
        (model(x).square().mean() + handle.loss()).backward()


def test_a_forward_without_graph_before_the_real_one_does_not_take_the_gradient() -> None:
    class Conditioned(Stack):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hint = super().forward(x)
            return super().forward(x + hint)

    torch.manual_seed(0)
    model, x = Conditioned(), tokens()
    handle = wrap_moe(model, penalty=SpectralRankPenalty(), balance=None)
    model(x)
    handle.loss().backward()
    for layer in model.layers:
        weight = layer.gate.weight.detach().clone().requires_grad_()
        (0.01 * spectral_rank_penalty(weight)).backward()
        torch.testing.assert_close(layer.gate.weight.grad, weight.grad)
