"""MoEHandle: what it measures, and the state that it carries."""

import copy
import io
import math

import pytest
import torch
from moe_models import BATCH, DIM, METRICS, Regressor, Stack, gradients, mixtral, mixtral_gates, tokens
from torch import Tensor, nn

from spectral_router import MoEHandle, SpectralRankPenalty, wrap_moe
from spectral_router.functional import spectral_rank_penalty

DRIFTS = ("sigma_drift", "rank_drift")


def test_metrics_by_hand() -> None:
    model = mixtral()
    with torch.no_grad():  # somebody else is always far more probable than the last expert of the first gate
        mixtral_gates(model)[0].weight *= 20
        mixtral_gates(model)[0].weight[-1] = 0
    handle = wrap_moe(model, penalty=SpectralRankPenalty(1.5, relative=True), penalty_coef=0.5, balance_coef=0.3)
    before = handle.metrics()
    for row in before.values():
        assert [name for name in METRICS if math.isnan(row[name])] == [
            *DRIFTS,
            "balance",
            "entropy",
            "max_share",
            "dead",
            "loss",
        ]
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
                **dict.fromkeys(DRIFTS, math.nan),
                "balance": balance,
                "entropy": (-share.xlogy(share).sum() / math.log(8)).item(),
                "max_share": share.max().item(),
                "dead": float((share < 0.01 / 8).sum()),
                "loss": 0.5 * penalty + 0.3 * balance,
            },
            rel=1e-4,
            nan_ok=True,
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
