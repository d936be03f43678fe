"""The presets of `wrap_moe`, the warning about gates that look trained, and the drift from where they began."""

import math
import warnings

import pytest
import torch
from moe_models import BATCH, DIM, Regressor, mixtral, mixtral_gates, tokens
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, MoEHandle, SpectralRankPenalty, wrap_moe
from spectral_router.functional import spectral_norm, stable_rank


class Layer(nn.Module):
    """A gate of 64 experts; each of them is one parameter."""

    def __init__(self, experts: int = 64, dim: int = 96) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scales = torch.cat([expert.weight[0] for expert in self.experts])
        return {"loss": (self.gate(x).softmax(-1) * scales).sum(-1).square().mean()}


def set_rank(weight: Tensor, rank: float) -> None:
    """One singular value above equal ones, so that the stable rank is this."""
    least = min(weight.shape)
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    values[0], values[1:] = 1.0, ((rank - 1) / (least - 1)) ** 0.5
    with torch.no_grad():
        weight.copy_(left * values @ right)


def trained(rank: float = 6.8, **sizes: int) -> Layer:
    model = Layer(**sizes)
    set_rank(model.gate.weight, rank)
    return model


def told(model: nn.Module, **options: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrap_moe(model, **options).remove()
    return [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("words", "written_out"),
    [
        ({}, SpectralRankPenalty("initial", relative=True)),
        ({"penalty": "spread"}, SpectralRankPenalty("initial", relative=True)),
        ({"penalty": "hold"}, SpectralRankPenalty("initial", "initial", relative=True, one_sided=True)),
        ({"penalty": "paper"}, SpectralRankPenalty(1.0, None)),
    ],
    ids=["default", "spread", "hold", "paper"],
)
def test_what_a_word_stands_for(words: dict[str, str], written_out: SpectralRankPenalty) -> None:
    first, second = wrap_moe(mixtral(), **words), wrap_moe(mixtral(), **words)
    assert repr(first.penalty) == repr(written_out)
    assert isinstance(first.balance, LoadBalanceLoss)
    assert first.penalty is not second.penalty  # anchors are of one model


def test_hold_leaves_a_trained_gate_alone_and_spread_does_not() -> None:
    x, slopes = torch.randn(40, 96), {}
    for penalty in (None, "hold", SpectralRankPenalty("initial", relative=True)):
        torch.manual_seed(0)
        model = trained()
        with wrap_moe(model, penalty=penalty, balance=None, penalty_coef=10.0):
            model(x)["loss"].backward()
        slopes[penalty if isinstance(penalty, str | None) else "spread"] = model.gate.weight.grad
    assert torch.equal(slopes["hold"], slopes[None])  # the term's gradient is zero, not small
    assert (slopes["spread"] - slopes[None]).norm() > 0.1


# ------------------------------------------------------------------------------------------------------------- warning


def test_a_gate_that_looks_trained_is_told_of_with_numbers() -> None:
    expected = (
        "1 of 1 gates look trained: stable rank 6.8 of 64 in gate, where a random matrix has about 19.4. "
        'penalty="spread", the default, pulls it up to 64 and so reshapes the routing; penalty="hold" keeps it where it is. '
        'To spread it all the same pass SpectralRankPenalty("initial", relative=True)'
    )
    assert told(trained()) == [expected]
    assert told(trained(), penalty="spread") == [expected]


def test_the_gate_furthest_from_a_random_one_is_named() -> None:
    model = nn.ModuleDict({"a": trained(6.8), "b": Layer(), "c": trained(2.5)})
    (message,) = told(model)
    assert message.startswith("2 of 3 gates look trained: stable rank 2.5 of 64 in c.gate,")


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": "hold"},
        {"penalty": "paper"},
        {"penalty": SpectralRankPenalty("initial", relative=True)},
        {"penalty": None},
        {"penalty": lambda weights: sum(weight.square().sum() for weight in weights)},
    ],
    ids=["hold", "paper", "written out", "none", "own"],
)
def test_who_says_what_he_wants_is_told_nothing(options: dict[str, object]) -> None:
    assert told(trained(), **options) == []


@pytest.mark.parametrize("initial", ["linear", "normal", "orthogonal", "xavier"])
@pytest.mark.parametrize(("experts", "dim"), [(2, 8), (4, 4), (8, 128), (16, 16), (64, 64), (64, 16)])
def test_new_gates_are_no_trained_ones(experts: int, dim: int, initial: str) -> None:
    model = nn.ModuleList(Layer(experts, dim) for _ in range(20))
    for layer in model:
        match initial:
            case "normal":
                nn.init.normal_(layer.gate.weight, std=0.02)
            case "orthogonal":
                nn.init.orthogonal_(layer.gate.weight)
            case "xavier":
                nn.init.xavier_uniform_(layer.gate.weight)
    assert told(model) == []


def test_gates_that_tell_nothing_are_passed_by() -> None:
    frozen, zero, broken = trained(), Layer(), Layer()
    frozen.gate.requires_grad_(False)
    nn.init.zeros_(zero.gate.weight)
    nn.init.constant_(broken.gate.weight, math.nan)
    for model in (frozen, zero, broken, trained().to("meta")):
        assert told(model) == []


def test_a_bfloat16_gate_is_read() -> None:
    assert "stable rank 6.8 of 64" in told(trained().bfloat16())[0]


# --------------------------------------------------------------------------------------------------------------- drift


def test_drift_by_hand() -> None:
    model = mixtral()
    with wrap_moe(model, penalty="hold") as handle:
        before = [(spectral_norm(gate.weight).item(), stable_rank(gate.weight).item()) for gate in mixtral_gates(model)]
        model(**BATCH).loss.backward()
        assert all(row["sigma_drift"] == row["rank_drift"] == 0 for row in handle.metrics().values())
        set_rank(mixtral_gates(model)[1].weight, 1.5)
        with torch.no_grad():
            mixtral_gates(model)[0].weight *= 1.3
        found = [(row["sigma_drift"], row["rank_drift"]) for row in handle.metrics().values()]
    assert found[0] == pytest.approx((0.3, 0), abs=1e-5)
    assert found[1] == pytest.approx((1 / before[1][0] - 1, 1.5 / before[1][1] - 1), rel=1e-4)


@pytest.mark.parametrize(
    ("penalty", "known"),
    [("hold", (True, True)), ("spread", (True, False)), ("paper", (False, False)), (None, (False, False))],
)
def test_drift_is_not_a_number_where_there_is_no_anchor(penalty: str | None, known: tuple[bool, bool]) -> None:
    rows = wrap_moe(mixtral(), penalty=penalty).metrics()
    assert {(not math.isnan(row["sigma_drift"]), not math.isnan(row["rank_drift"])) for row in rows.values()} == {known}


def test_drift_of_a_penalty_of_ones_own_and_of_frozen_gates() -> None:
    own = wrap_moe(Regressor(), penalty=lambda weights: sum(weight.square().sum() for weight in weights))
    frozen = Regressor()
    for layer in frozen.layers:
        layer.gate.requires_grad_(False)
    for handle in (own, wrap_moe(frozen, penalty="hold")):
        assert all(math.isnan(row["sigma_drift"]) and math.isnan(row["rank_drift"]) for row in handle.metrics().values())


def test_tied_gates_share_an_anchor() -> None:
    model = Regressor()
    model.layers[1].gate.weight = model.layers[0].gate.weight
    handle = wrap_moe(model, penalty="hold", penalty_coef=1.0)
    model(tokens(), torch.zeros(3, 5, DIM))["loss"].backward()
    assert handle.penalty.rank_anchor.shape == (1,)
    with torch.no_grad():
        model.layers[0].gate.weight *= 2
    assert [row["sigma_drift"] for row in handle.metrics().values()] == pytest.approx([1.0, 1.0])


def test_a_resumed_run_is_held_where_it_began() -> None:
    def wrapped(model: nn.Module) -> MoEHandle:
        return wrap_moe(model, penalty="hold", penalty_coef=1.0)

    model = mixtral()
    handle = wrapped(model)
    model(**BATCH).loss.backward()
    set_rank(mixtral_gates(model)[0].weight, 1.5)
    resumed = mixtral()
    resumed.load_state_dict(model.state_dict())
    fresh, own = wrapped(mixtral()), wrapped(resumed)
    own.load_state_dict(handle.state_dict())
    assert {name: row["rank_drift"] for name, row in own.metrics().items()} == {
        name: row["rank_drift"] for name, row in handle.metrics().items()
    }
    assert min(row["rank_drift"] for row in own.metrics().values()) < -0.3
    assert all(row["rank_drift"] == 0 for row in fresh.metrics().values())
