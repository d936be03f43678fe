"""Orthogonality: the three forms against a loop over pairs of rows, their bounds, and the penalty over many matrices."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_models import DIM, Regressor, tokens
from operations import SYNCHRONISING, count
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty, wrap_moe
from spectral_router.functional import orthogonality
from spectral_router.penalties.orthogonality import OrthogonalityPenalty

FORMS = ("so", "simbal", "ernie")
EACH = pytest.mark.parametrize("form", FORMS)


def gradient(function, weight: Tensor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


# ---------------------------------------------------------------------------------------------------------------- values


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
    form=st.sampled_from(FORMS),
)
def test_value_and_gradient_are_those_of_the_double_loop(shape, dtype, scale: float, seed: int, form: str) -> None:
    weight = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    value = orthogonality(weight, form)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(value.double(), reference.orthogonality(weight, form), rtol=close, atol=close)
    ours = gradient(lambda w: orthogonality(w, form), weight).double()
    theirs = gradient(lambda w: reference.orthogonality(w, form), weight.double())
    error = (ours - theirs).norm() * max(scale, 1e-3)
    assert error <= (2e-2 if dtype in (torch.bfloat16, torch.float16) else close) * (1 + theirs.norm() * max(scale, 1e-3))


@EACH
def test_zero_at_orthonormal_rows_only(form: str) -> None:
    weight = torch.linalg.qr(torch.randn(16, 5, dtype=torch.float64)).Q.mT
    assert orthogonality(weight, form).item() == pytest.approx(0, abs=1e-12)
    assert (orthogonality(3 * weight, form) > 1) == (form != "ernie")  # which leaves lengths free
    weight[0] += 0.5 * weight[1]
    assert orthogonality(weight, form) > 1e-2
    torch.testing.assert_close(orthogonality(-weight, form), orthogonality(weight, form))


@EACH
def test_least_values_with_more_rows_than_columns(form: str) -> None:
    num_experts, dim = 6, 2
    angles = torch.arange(num_experts) * math.pi / num_experts
    even = torch.stack([angles.cos(), angles.sin()], -1)  # a tight frame
    bound = 1 / dim - 1 / num_experts if form == "ernie" else num_experts - dim
    best = even if form == "ernie" else torch.eye(num_experts, dim)
    assert orthogonality(best, form).item() == pytest.approx(bound, rel=1e-5)
    for scale in (0.1, 0.5, 1.0):
        assert (orthogonality(scale * torch.randn(200, num_experts, dim), form) >= bound - 1e-5).all()


@EACH
def test_leading_dimensions_and_autocast(form: str) -> None:
    weight = torch.randn(2, 3, 4, 9)
    values = orthogonality(weight, form)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], orthogonality(weight[1, 2], form))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality(weight, form), values)


def test_ernie_reads_directions_whatever_the_lengths() -> None:
    weight = torch.randn(4, 9)
    lengths = torch.tensor([1e-18, 1.0, 1e18, 7.0])[:, None]
    torch.testing.assert_close(orthogonality(weight * lengths, "ernie"), orthogonality(weight, "ernie"))


@EACH
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 4),
        torch.tensor([[1.0, 2, 3], [0, 0, 0], [-1, 0, 1]]),
        torch.ones(3, 4),
        torch.tensor([[1.0], [2.0], [-3.0]]),
        torch.full((2, 3), 1e-40),
    ],
    ids=["zero", "zero row", "duplicates", "one dimension", "subnormal"],
)
def test_degenerate_matrices_are_finite(form: str, weight: Tensor) -> None:
    assert orthogonality(weight, form).isfinite()
    slopes = gradient(lambda w: orthogonality(w, form), weight)
    assert slopes.isfinite().all()
    assert (slopes[(weight == 0).all(-1)] == 0).all()


@EACH
def test_nan_and_inf_are_not_hidden(form: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.randn(2, 3, 4)
        weight[0, 1, 2] = bad
        values = orthogonality(weight, form)
        assert values.isfinite().tolist() == [False, True]
        assert values[0].isnan() or not math.isnan(bad)


@EACH
def test_gradcheck(form: str) -> None:
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: orthogonality(w, form), weight)
    assert torch.autograd.gradgradcheck(lambda w: orthogonality(w, form), weight)


# --------------------------------------------------------------------------------------------------------------- penalty


@EACH
def test_penalty_is_the_sum_over_gates(form: str) -> None:
    weights = [torch.randn(shape) for shape in ((4, 16), (8, 3), (4, 16), (1, 7))]
    weights.append(torch.randn(4, 16, dtype=torch.float64))
    penalty = OrthogonalityPenalty(form)
    parts = [orthogonality(weight, form) for weight in weights]
    torch.testing.assert_close(penalty(weights), sum(parts))
    assert penalty(weights).dtype == torch.float64
    for part, expected in zip(penalty.each(weights), parts, strict=True):
        torch.testing.assert_close(part, expected)
    stacked = torch.randn(2, 3, 4, 9)
    for same in (stacked.flatten(0, 1).unbind(), iter(stacked.flatten(0, 1)), [stacked[0], stacked[1]]):
        torch.testing.assert_close(penalty(same), penalty(stacked))
    assert penalty.state_dict() == {}
    assert repr(eval(repr(penalty))) == repr(penalty)


@EACH
def test_operations_do_not_grow_with_the_number_of_gates_and_read_nothing_back(form: str) -> None:
    few, many = (count(OrthogonalityPenalty(form), [nn.Parameter(torch.randn(4, 8)) for _ in range(n)]) for n in (2, 20))
    assert few["mm"] + few["bmm"] == many["mm"] + many["bmm"] > 0
    for view in ("detach", "view", "unbind", "select", "alias", "slice", "unsqueeze"):
        few[view] = many[view] = 0
    assert few == many
    assert not SYNCHRONISING & set(few)


@pytest.mark.parametrize("form", ["so", "simbal"])
def test_descent_ends_where_the_spectral_penalty_is_zero(form: str) -> None:
    weight = nn.Parameter(torch.randn(4, 16) / 4)
    for step in range(400):
        (grad,) = torch.autograd.grad(OrthogonalityPenalty(form)([weight]), weight)
        with torch.no_grad():
            weight -= 0.02 * 0.99**step * grad
    assert SpectralRankPenalty(1.0)([weight]) < 0.02


@EACH
def test_plugs_into_wrap_moe(form: str) -> None:
    model = Regressor()
    expected = [0.5 * orthogonality(layer.gate.weight, form).item() for layer in model.layers]
    x, target = tokens(), torch.randn(3, 5, DIM)
    with wrap_moe(model, penalty=OrthogonalityPenalty(form), balance=None, penalty_coef=0.5) as handle:
        with_term = model(x, target)["loss"]
        rows = list(handle.metrics().values())
    assert (with_term - model(x, target)["loss"]).item() == pytest.approx(sum(expected), rel=1e-4)
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
@EACH
def test_compiles_without_a_graph_break(form: str) -> None:
    torch.compiler.reset()
    penalty = OrthogonalityPenalty(form)
    fast = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4, 16), (8, 5), (4, 16))]
    expected, value = penalty(weights), fast(weights)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, weights), torch.autograd.grad(expected, weights))
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------------- messages


def test_messages() -> None:
    for function in (OrthogonalityPenalty, lambda form: orthogonality(torch.eye(3), form)):
        with pytest.raises(ValueError, match='form must be "so", "simbal" or "ernie", got form=\'srip\''):
            function("srip")
    for function in (OrthogonalityPenalty(), orthogonality):
        with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
            function(torch.ones(3, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"weight must hold matrices, .* got shape \(0, 4\)"):
            function(torch.ones(0, 4))
    with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
        OrthogonalityPenalty()([])
    with pytest.raises(TypeError, match="weights must be tensors, got list at position 0"):
        OrthogonalityPenalty()([[1.0]])
