"""functional.spectral_norm, stable_rank and spectral_rank_penalty against the SVD in float64."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_router.functional import spectral_norm, spectral_rank_penalty, stable_rank

FUNCTIONS = pytest.mark.parametrize("function", [spectral_norm, stable_rank, spectral_rank_penalty])
SEPARATED = ("separated", "dominant", "rank one", "twin rows")
NONZERO = (*SEPARATED, "generic", "tied")
# the powers of ten that entries of each dtype can be scaled by: the documented range, cut to what the dtype can hold
EXPONENTS = {torch.float32: 18, torch.float64: 18, torch.bfloat16: 18, torch.float16: 3}


def matrix(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A float64 matrix with a spectrum of the given kind, sigma_max in [0.5, 1] (any for "twin rows")."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    small = min(rows, columns)
    if kind == "twin rows":
        return normal(1, columns).expand(rows, columns)
    values = torch.rand(small, generator=generator, dtype=torch.float64)
    spectrum = {
        "generic": 0.5 + 0.5 * values,
        "separated": 0.9 * values,
        "tied": torch.ones(small, dtype=torch.float64),
        "dominant": 1e-3 * values,
        "rank one": 0 * values,
        "zero": 0 * values,
    }[kind]
    if kind in SEPARATED:
        spectrum[0] = 1
    left, right = torch.linalg.qr(normal(rows, small)).Q, torch.linalg.qr(normal(columns, small)).Q
    return left * spectrum @ right.mT


@st.composite
def weights(draw: st.DrawFn, kinds: tuple[str, ...] = (*NONZERO, "zero"), dtypes: tuple[torch.dtype, ...] = tuple(EXPONENTS)):
    """(*, m, n) of every shape, dtype, scale, spectrum and memory layout; each matrix of the batch of a kind of its own."""
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        rows, columns = columns, rows
    dtype = draw(st.sampled_from(dtypes))
    scale = 10.0 ** draw(st.integers(-EXPONENTS[dtype], EXPONENTS[dtype]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batch = [matrix(draw(st.sampled_from(kinds)), rows, columns, generator) for _ in range(math.prod(leading))]
    weight = (scale * torch.stack(batch)).reshape(*leading, rows, columns).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        return weight.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([weight, weight], -1)[..., 0]
    if layout == "expanded":
        return weight.expand(2, *weight.shape)
    return weight


def tolerance(weight: Tensor, single: float, double: float) -> float:
    return double if weight.dtype == torch.float64 else single


def gradient(function, weight: Tensor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def norm(matrices: Tensor) -> Tensor:
    return matrices.double().norm(dim=(-2, -1))


def inner(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() * right.double()).sum((-2, -1))


@given(weights())
def test_values_are_those_of_the_svd(weight: Tensor) -> None:
    for function, expected in ((spectral_norm, reference.spectral_norm), (stable_rank, reference.stable_rank)):
        value = function(weight)
        assert value.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), expected(weight), rtol=tolerance(weight, 1e-5, 1e-12), atol=0)
    # value is now that of stable_rank: its range holds without any tolerance, and so is R - rank_target never positive
    assert ((value == 0) | (value >= 1)).all()
    assert (value <= min(weight.shape[-2:])).all()


@given(weights(), st.sampled_from([0.5, 1.0, 3.0]), st.booleans(), st.booleans())
def test_penalty_is_equations_3_and_5(weight: Tensor, sigma_target: float, low_rank: bool, relative: bool) -> None:
    rank_target = 1.0 if low_rank else None
    value = spectral_rank_penalty(weight, sigma_target, rank_target, relative=relative)
    expected = reference.spectral_rank_penalty(weight, sigma_target, rank_target, relative)
    # near the target a deviation is a difference of nearly equal numbers: the error is that of sigma and R, not of it.
    # sigma^2 may be above the largest float32: then inf is the answer, in the reference too once it is a float32.
    size = reference.spectral_norm(weight) + reference.stable_rank(weight) + 12
    error = tolerance(weight, 1e-5, 1e-12) * size * expected.sqrt() + tolerance(weight, 1e-9, 1e-22) * size**2
    same = (value.double() - expected).abs() <= error
    assert (same | (value == expected.to(value.dtype))).all()


@given(weights(SEPARATED, (torch.float32, torch.float64)))
def test_gradients_are_those_of_the_svd_where_the_top_value_is_separated(weight: Tensor) -> None:
    sigma = reference.spectral_norm(weight)
    for function, expected in ((spectral_norm, reference.spectral_norm), (stable_rank, reference.stable_rank)):
        truth = reference.gradient(expected, weight)
        error = norm(gradient(function, weight).double() - truth)
        # at rank one the gradient of R vanishes, and rounding of order 1 / sigma is what remains of it
        floor = 0 if function is spectral_norm else tolerance(weight, 1e-5, 1e-12) / sigma
        assert (error <= tolerance(weight, 1e-4, 1e-10) * norm(truth) + floor).all()


@given(weights(NONZERO, (torch.float32, torch.float64)))
def test_gradient_of_sigma_is_a_subgradient_even_at_ties(weight: Tensor) -> None:
    grad, close = gradient(spectral_norm, weight), tolerance(weight, 1e-5, 1e-12)
    # u v^T of unit vectors with u^T W v = sigma: exactly the extreme points of the subdifferential
    torch.testing.assert_close(norm(grad), torch.ones_like(norm(grad)), rtol=close, atol=0)
    torch.testing.assert_close(reference.stable_rank(grad), torch.ones_like(norm(grad)), rtol=close, atol=0)
    torch.testing.assert_close(inner(grad, weight), reference.spectral_norm(weight), rtol=close, atol=0)


@given(weights(NONZERO, (torch.float32, torch.float64)))
def test_gradient_of_rank_is_orthogonal_to_the_weight_and_of_known_norm(weight: Tensor) -> None:
    grad, close = gradient(stable_rank, weight), tolerance(weight, 1e-5, 1e-12)
    sigma, rank = reference.spectral_norm(weight), reference.stable_rank(weight)
    assert (inner(grad, weight).abs() * sigma <= close * (norm(grad) * sigma + 1) * norm(weight)).all()
    # compared as squares: at R = 1 the root would turn a rounding of R into its square root
    torch.testing.assert_close((norm(grad) * sigma).square(), 4 * rank * (rank - 1), rtol=10 * close, atol=10 * close)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (2, 4, 3)])
@pytest.mark.parametrize("relative", [False, True])
def test_gradcheck(shape: tuple[int, ...], relative: bool) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = (torch.rand(shape[:-2], dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(spectral_norm, weight)
    assert torch.autograd.gradcheck(stable_rank, weight)
    assert torch.autograd.gradcheck(lambda w: spectral_rank_penalty(w, 2.0, 1.0, relative=relative), weight)
    assert torch.autograd.gradcheck(lambda w, t: spectral_rank_penalty(w, t, relative=relative), (weight, target))


def test_sigma_target_tensor_gives_each_matrix_its_own() -> None:
    weight, targets = torch.randn(2, 3, 4, 6), torch.tensor([[1.0], [2.0]])
    expected = torch.stack([spectral_rank_penalty(weight[0], 1.0), spectral_rank_penalty(weight[1], 2.0)])
    torch.testing.assert_close(spectral_rank_penalty(weight, targets), expected)


@FUNCTIONS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (1, 1)])
def test_not_finite_stays_in_its_own_matrix(function, bad: float, shape: tuple[int, int]) -> None:
    clean = torch.randn(3, *shape)
    dirty = clean.clone()
    dirty[1, -1, 0] = bad
    value, grad = function(dirty), gradient(function, dirty)
    assert value[1].isnan()
    assert grad[1].isnan().all()
    neighbours = [0, 2]
    torch.testing.assert_close(value[neighbours], function(clean[neighbours]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[neighbours], gradient(function, clean[neighbours]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(EXPONENTS))
def test_zero_matrix_gives_zero_and_zero_gradient(dtype: torch.dtype) -> None:
    weight = torch.stack([torch.zeros(4, 6), torch.eye(4, 6)]).to(dtype)
    assert spectral_norm(weight).tolist() == [0, 1]
    assert stable_rank(weight).tolist() == [0, 4]
    for function in (spectral_norm, stable_rank, spectral_rank_penalty):
        assert (gradient(function, weight)[0] == 0).all()


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("random", [False, True])
def test_orthonormal_rows_have_full_rank_and_a_finite_gradient(rows: int, random: bool) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(rows, 24)) if random else torch.eye(rows, 24)
    assert stable_rank(weight).item() == pytest.approx(rows, rel=1e-5)
    assert spectral_norm(weight).item() == pytest.approx(1, rel=1e-5)
    assert spectral_rank_penalty(weight).item() == pytest.approx(0, abs=1e-7)
    assert gradient(stable_rank, weight).isfinite().all()
    # the optimum of the penalty: a bounded subgradient times a deviation of zero
    assert norm(gradient(spectral_rank_penalty, weight)) < 1e-3


def test_collapsed_router_gets_no_gradient_from_the_rank() -> None:
    weight = torch.outer(torch.randn(6), torch.randn(9))
    assert stable_rank(weight).item() == pytest.approx(1, rel=1e-6)
    assert norm(gradient(stable_rank, weight)) < 1e-5 / spectral_norm(weight)


@FUNCTIONS
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4, 3)])
def test_empty_batch(function, shape: tuple[int, ...]) -> None:
    assert function(torch.zeros(shape)).shape == shape[:-2]
    assert gradient(function, torch.zeros(shape)).shape == shape
