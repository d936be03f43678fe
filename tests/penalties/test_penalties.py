"""SpectralRankPenalty: values, anchors and messages."""

import io
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty
from spectral_router.functional import spectral_norm, spectral_rank_penalty

SHAPES = [(4, 16), (8, 3), (4, 16), (2, 2), (1, 7), (8, 3), (5, 1)]
STATEFUL = pytest.mark.parametrize("options", [{"sigma_target": "initial"}, {"solver": "power"}])


def gates(*shapes: tuple[int, ...], scale: float = 1.0) -> list[nn.Parameter]:
    return [nn.Parameter(scale * torch.randn(shape)) for shape in shapes]


def gradients(penalty: nn.Module, weights: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(penalty(weights), weights))


# ---------------------------------------------------------------------------------------------------------------- values


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=6, max_size=6),
    sigma_target=st.sampled_from([0.5, 1.0]),
    relative=st.booleans(),
    center=st.booleans(),
)
def test_penalty_is_the_sum_over_gates(shapes, dtypes, sigma_target: float, relative: bool, center: bool) -> None:
    shapes = [*shapes, shapes[0]]  # at least one shape twice
    weights = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, (*dtypes, dtypes[0]), strict=False)]
    penalty = SpectralRankPenalty(sigma_target, relative=relative, center=center)
    expected = sum(
        reference.spectral_rank_penalty(weight, sigma_target, relative=relative, center=center) for weight in weights
    )
    value = penalty(weights)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if torch.float64 in [weight.dtype for weight in weights] else torch.float32)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_function() -> None:
    weights = gates(*SHAPES)
    expected = torch.autograd.grad(sum(spectral_rank_penalty(weight) for weight in weights), weights)
    torch.testing.assert_close(gradients(SpectralRankPenalty(), weights), list(expected))


def test_tensor_list_and_generator_are_the_same_thing() -> None:
    stacked, penalty = torch.randn(2, 3, 4, 9), SpectralRankPenalty(relative=True)
    expected = spectral_rank_penalty(stacked, relative=True).sum()
    torch.testing.assert_close(penalty(stacked), expected)
    torch.testing.assert_close(penalty(stacked.flatten(0, 1).unbind()), expected)
    torch.testing.assert_close(penalty(matrix for matrix in stacked.flatten(0, 1)), expected)
    torch.testing.assert_close(penalty([stacked[0], stacked[1]]), expected)


def test_half_precision_gates_are_centred_in_float32() -> None:
    # rows that share a large offset, as prototypes of inputs with a mean do: a mean in bfloat16 would be off by 2^-9 of it
    weight = (3 + 0.05 * torch.randn(8, 64)).bfloat16()
    penalty = SpectralRankPenalty(center=True)
    torch.testing.assert_close(penalty([weight]), penalty([weight.float()]))


def test_center_reaches_zero_at_a_simplex_and_sees_no_common_shift() -> None:
    simplex = torch.eye(4) - 0.25
    penalty = SpectralRankPenalty(center=True)
    assert penalty([simplex]).item() == pytest.approx(0, abs=1e-9)
    assert penalty([simplex + torch.randn(4)]).item() == pytest.approx(0, abs=1e-9)
    assert SpectralRankPenalty()([simplex]).item() == pytest.approx(1, rel=1e-5)  # R is 3 of 4


def test_a_broken_gate_makes_the_sum_nan_and_leaves_the_other_gradients() -> None:
    good, bad = gates((4, 16), (4, 16))
    with torch.no_grad():
        bad[0, 0] = math.nan
    for penalty in (SpectralRankPenalty(), SpectralRankPenalty(solver="power"), SpectralRankPenalty("initial")):
        assert penalty([good, bad]).isnan()
        of_good, of_bad = gradients(penalty, [good, bad])
        assert of_good.isfinite().all()
        assert of_bad.isnan().all()


# --------------------------------------------------------------------------------------------------------------- anchors


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize("relative", [False, True])
def test_initial_holds_each_gate_at_its_own_norm(solver: str, relative: bool) -> None:
    # rank_target 1 at rank one: the rank part is zero, and what is left is the part that the anchor governs
    weights = [scale * torch.outer(torch.randn(4), torch.randn(9)) for scale in (0.1, 1.0, 20.0)]
    penalty = SpectralRankPenalty("initial", rank_target=1, relative=relative, solver=solver)
    assert penalty(weights).item() == pytest.approx(0, abs=1e-6)
    norms = [spectral_norm(weight) for weight in weights]
    torch.testing.assert_close(penalty.anchor, torch.stack(norms))
    doubled = sum(1 if relative else value**2 for value in norms)
    assert penalty([2 * weight for weight in weights]).item() == pytest.approx(float(doubled), rel=1e-4)
    torch.testing.assert_close(penalty.anchor, torch.stack(norms))  # first seen, not last seen


def test_initial_anchors_have_no_gradient() -> None:
    weights = gates((4, 9))
    penalty = SpectralRankPenalty("initial", rank_target=1)
    drifted = [nn.Parameter(2 * weight.detach()) for weight in weights]
    penalty(weights)
    assert not penalty.anchor.requires_grad
    fixed = SpectralRankPenalty(penalty.anchor.item(), rank_target=1)
    torch.testing.assert_close(gradients(penalty, drifted), gradients(fixed, drifted))


@pytest.mark.parametrize("solver", ["exact", "power"])
def test_initial_zero_matrix_is_anchored_at_one(solver: str) -> None:
    penalty = SpectralRankPenalty("initial", relative=True, solver=solver)
    penalty([torch.zeros(3, 5), 7 * torch.eye(3, 5)])
    assert penalty.anchor.tolist() == pytest.approx([1, 7])


@pytest.mark.parametrize("solver", ["exact", "power"])
def test_initial_nan_at_first_sight_waits_for_a_number(solver: str) -> None:
    penalty = SpectralRankPenalty("initial", solver=solver)
    assert penalty([torch.eye(3, 5), torch.full((3, 5), math.nan)]).isnan()
    penalty([9 * torch.eye(3, 5), 4 * torch.eye(3, 5)])
    assert penalty.anchor.tolist() == pytest.approx([1, 4])


def test_anchor_is_float64_if_a_gate_is() -> None:
    penalty = SpectralRankPenalty("initial")
    penalty([torch.eye(3), math.pi * torch.eye(3, dtype=torch.float64)])
    assert penalty.anchor.tolist() == [1, pytest.approx(math.pi, rel=1e-14)]


def test_state_dict_carries_the_anchors() -> None:
    weights = gates(*SHAPES)
    trained = SpectralRankPenalty("initial")
    trained(weights)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == ["anchor"]
    moved = [3 * weight for weight in weights]
    never_called, called = SpectralRankPenalty("initial"), SpectralRankPenalty("initial")
    called(moved)
    for penalty in (never_called, called):
        penalty.load_state_dict(state)
        torch.testing.assert_close(penalty(moved), trained(moved))
    # inside a larger module the key has a prefix
    parent = nn.ModuleDict({"penalty": SpectralRankPenalty("initial")})
    parent.load_state_dict({"penalty.anchor": state["anchor"]})
    torch.testing.assert_close(parent["penalty"](moved), trained(moved))


def test_state_dict_of_a_fixed_target_is_empty() -> None:
    for solver in ("exact", "power"):
        penalty = SpectralRankPenalty(solver=solver)
        penalty(gates(*SHAPES))
        assert penalty.state_dict() == {}


# -------------------------------------------------------------------------------------------------------------- messages


@STATEFUL
@pytest.mark.parametrize("others", [[(4, 8)], [(4, 9)], [(4, 8), (4, 8), (4, 8)], [(4, 8), (2, 8)]])
def test_message_other_matrices(options: dict[str, str], others: list[tuple[int, int]]) -> None:
    penalty = SpectralRankPenalty(**options)
    penalty(gates((4, 8), (4, 8)))
    message = (
        r'with a target "initial" or solver="power" every call must bring the matrices of the first call, shapes '
        r"\[\(2, 4, 8\)\], got \[.*\]; use one SpectralRankPenalty for each model"
    )
    with pytest.raises(ValueError, match=message):
        penalty(gates(*others))
    penalty(gates((4, 8), (4, 8)))  # and the module still works


@STATEFUL
def test_a_refused_first_call_is_not_remembered(options: dict[str, str]) -> None:
    penalty = SpectralRankPenalty(rank_target=5, **options)
    with pytest.raises(ValueError, match="rank_target must be at most"):
        penalty(gates((4, 8)))
    assert penalty(gates((8, 8))).isfinite()


def test_message_loaded_anchors_of_another_model() -> None:
    penalty = SpectralRankPenalty("initial")
    penalty.load_state_dict({"anchor": torch.ones(3)})
    with pytest.raises(ValueError, match="the loaded state holds anchors of 3 matrices, got 2 matrices"):
        penalty(gates((4, 8), (4, 8)))
    assert penalty(gates((4, 8), (4, 8), (4, 8))).isfinite()


@pytest.mark.parametrize("empty", [[], iter(())])
def test_message_no_matrix(empty) -> None:
    with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
        SpectralRankPenalty()(empty)


def test_message_not_a_matrix() -> None:
    message = r"weights must be matrices \(experts, dim\), got shape \(4,\) at position 1"
    with pytest.raises(ValueError, match=message):
        SpectralRankPenalty()([torch.eye(3), torch.ones(4)])
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        SpectralRankPenalty()([torch.ones(3, 4, dtype=torch.int64)])


def test_message_constructor() -> None:
    with pytest.raises(ValueError, match="""sigma_target must be a number or "initial", got sigma_target='first'"""):
        SpectralRankPenalty("first")
    with pytest.raises(ValueError, match="sigma_target must be a finite number of at least 0, got sigma_target=-1"):
        SpectralRankPenalty(-1)
    with pytest.raises(ValueError, match="sigma_target must be above 0 when relative=True"):
        SpectralRankPenalty(0, relative=True)
    with pytest.raises(ValueError, match="rank_target must be at least 1"):
        SpectralRankPenalty("initial", 0.5)
    with pytest.raises(ValueError, match="""solver must be "auto", "exact" or "power", got solver='svd'"""):
        SpectralRankPenalty(solver="svd")
    with pytest.raises(ValueError, match="""rank_target must be a number, "initial" or None, got rank_target='first'"""):
        SpectralRankPenalty(1.0, "first")
    # one number for all matrices: a tensor of them has no matrices to belong to
    with pytest.raises((TypeError, ValueError), match="sigma_target must be a number"):
        SpectralRankPenalty(torch.ones(3))
    with pytest.raises((TypeError, ValueError), match="rank_target must be a number"):
        SpectralRankPenalty(1.0, torch.ones(3))


def test_message_centred_rank_target_out_of_reach() -> None:
    message = r"rank_target must be at most min\(num_experts - 1, dim\) = 3, .* shape \(4, 9\) can reach, got rank_target=4"
    with pytest.raises(ValueError, match=message):
        SpectralRankPenalty(rank_target=4, center=True)([torch.eye(4, 9)])


def test_repr_is_the_call_that_makes_it() -> None:
    for penalty in (
        SpectralRankPenalty("initial", 2, relative=True, center=True, solver="power"),
        SpectralRankPenalty(2, "initial", one_sided=True, solver="exact"),
    ):
        assert repr(eval(repr(penalty))) == repr(penalty)
