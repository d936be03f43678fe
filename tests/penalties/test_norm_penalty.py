"""SpectralNormPenalty: values and gradients of its two solvers."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_matrices import dominated, gradients, iterates, layers
from torch import Tensor, nn

from spectral_router import SpectralNormPenalty, penalize

SHAPES = [(4, 16), (8, 3), (4, 16), (2, 2), (1, 7), (8, 3, 3, 3), (5, 1), (6, 4, 5)]
SOLVERS = pytest.mark.parametrize("solver", ["iteration", "exact"])


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=6, max_size=6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    sigma_target=st.sampled_from([0.0, 0.5, 1.0]),
    power=st.sampled_from([1, 2, 2.5]),
)
def test_exact_is_the_literal_formula(shapes, dtypes, scale: float, sigma_target: float, power: float) -> None:
    shapes = [*shapes, shapes[0]]  # at least one shape twice
    weights = [scale * torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, (*dtypes, dtypes[0]), strict=False)]
    penalty = SpectralNormPenalty(sigma_target, power=power, solver="exact")
    value = penalty(weights)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if torch.float64 in [weight.dtype for weight in weights] else torch.float32)
    torch.testing.assert_close(
        value.double(), reference.spectral_norm_penalty(weights, sigma_target, power), rtol=1e-4, atol=1e-6
    )


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e3, 1e18]),
    seed=st.integers(0, 99),
)
def test_iteration_never_reads_high_and_settles(shape: tuple[int, ...], dtype: torch.dtype, scale: float, seed: int) -> None:
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # σ itself, whose square leaves float32 at the largest and the smallest scale
    penalty = SpectralNormPenalty(iterations=50)
    sigma = reference.spectral_norm_penalty([weight]).sqrt().item()
    for _ in range(4):
        read = penalty._iterated([weight.flatten(1)], "iterate_0").item()
        assert 0.9 * sigma <= read <= sigma * (1 + 1e-5)
    assert read == pytest.approx(sigma, rel=1e-2)


def test_first_iterations_read_what_exact_does() -> None:
    weights = dominated(*SHAPES)
    for options in ({}, {"sigma_target": 1.0, "power": 2}):
        expected = SpectralNormPenalty(**options, solver="exact")(weights)
        torch.testing.assert_close(SpectralNormPenalty(**options)(weights), expected, rtol=1e-5, atol=1e-5)


@SOLVERS
@pytest.mark.parametrize("power", [1, 2])
def test_gradient_is_the_outer_product_of_the_top_vectors(solver: str, power: int) -> None:
    weights = dominated(*SHAPES)
    for weight, gradient in zip(weights, gradients(SpectralNormPenalty(0.5, power=power, solver=solver), weights), strict=True):
        u, s, vh = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
        slope = 2 * (s[0] ** power - 0.5**power) * power * s[0] ** (power - 1)
        expected = (slope * torch.outer(u[:, 0], vh[0])).view(weight.shape)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * float(slope))


def test_one_iteration_a_step_is_that_of_the_paper() -> None:
    # u <- W v, v <- W^T u, both at unit length; sigma = u^T W v, whose gradient is u v^T however far they are from the top
    weight = nn.Parameter(torch.randn(6, 9))
    penalty = SpectralNormPenalty()
    penalty([torch.randn(6, 9)])  # its iterate is another matrix's
    ((_, v),) = iterates(penalty).items()
    (gradient,) = gradients(penalty, [weight])
    matrix = weight.detach()
    steps = torch.arange(1, 10.0)
    v = v[0] + 1e-4 * torch.sin(steps**2) / torch.sin(steps**2).norm()
    u = nn.functional.normalize(matrix @ v, dim=0)
    v = nn.functional.normalize(matrix.mT @ u, dim=0)
    torch.testing.assert_close(gradient, 2 * (u @ matrix @ v) * torch.outer(u, v), rtol=1e-4, atol=1e-5)


def test_more_iterations_read_closer() -> None:
    weights, errors = layers((64, 512)), []
    exact = SpectralNormPenalty(solver="exact")(weights).item()
    for iterations in (1, 20, 200):
        value = SpectralNormPenalty(iterations=iterations)(weights).item()
        assert value <= exact * (1 + 1e-5)
        errors.append(1 - value / exact)
    assert errors[0] > errors[1] > errors[2] < 1e-3
    assert errors[0] < 0.05


def trained(solver: str, coef: float = 0.005, lr: float = 0.01) -> tuple[list[float], list[float]]:
    """The errors of one warm iteration, relative to the exact value, and the exact values, while a small network trains."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x[:, :4] @ torch.randn(4, 4)).tanh()
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    penalty, judge = SpectralNormPenalty(solver=solver), SpectralNormPenalty(solver="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    errors, path = [], []
    for _ in range(150):
        optimizer.zero_grad()
        value = penalize(model, penalty)
        path.append(penalize(model, judge).item())
        errors.append(1 - value.item() / path[-1])
        ((model(x) - y).square().mean() + coef * value).backward()
        optimizer.step()
    return errors, path


def test_one_iteration_a_step_follows_training() -> None:
    errors, path = trained("iteration")
    assert min(errors) > -1e-5
    assert sorted(errors)[75] < 0.01
    assert max(errors) < 0.05
    # and leads where the exact penalty does
    _, expected = trained("exact")
    assert path == pytest.approx(expected, rel=0.02)
    _, without = trained("exact", coef=0)
    assert path[-1] < 0.95 * without[-1]


def test_training_with_the_penalty_alone_ends_at_the_target() -> None:
    weights = layers((6, 10), (6, 10), (4, 3, 3, 3), scale=0.5)
    penalty = SpectralNormPenalty(1, power=2)
    optimizer = torch.optim.SGD(weights, lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        penalty(weights).backward()
        optimizer.step()
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


@SOLVERS
def test_a_leading_dimension_is_no_batch(solver: str) -> None:
    kernel = dominated((8, 4, 3, 3))[0]
    penalty = SpectralNormPenalty(solver=solver)
    torch.testing.assert_close(penalty(kernel).double(), reference.spectral_norm_penalty([kernel]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(penalty([kernel]), penalty(item for item in [kernel.flatten(1)]))
    channels_last = kernel.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(penalty([channels_last]), penalty([kernel]).detach())


@SOLVERS
def test_each_sums_to_forward_in_the_order_given(solver: str) -> None:
    weights = layers(*SHAPES)
    penalty = SpectralNormPenalty(1, power=2, solver=solver).eval()
    parts = penalty.each(weights)
    torch.testing.assert_close(torch.stack(parts).sum(), penalty(weights))
    alone = [SpectralNormPenalty(1, power=2, solver=solver)(weight) for weight in weights]
    torch.testing.assert_close(parts, alone, rtol=1e-4, atol=1e-4)


@SOLVERS
def test_zero_matrix_gives_zero_and_no_gradient(solver: str) -> None:
    for power in (1, 1.5, 2):
        weights = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.eye(3, 5))]
        penalty = SpectralNormPenalty(power=power, solver=solver)
        for _ in range(2):
            assert penalty(weights).item() == pytest.approx(1)
            of_zero, of_eye = gradients(penalty, weights)
            assert (of_zero == 0).all()
            assert torch.linalg.matrix_norm(of_eye).item() == pytest.approx(2 * power, rel=1e-3)


@SOLVERS
@pytest.mark.parametrize(
    "weight",
    [torch.eye(4), torch.ones(4, 6), torch.eye(6, 4), torch.diag(torch.tensor([2.0, 2.0, 0.0])), 1e6 * torch.ones(64, 64)],
    ids=["identity", "rank one", "tall", "singular", "large"],
)
def test_degenerate_matrices_have_finite_gradients(solver: str, weight: Tensor) -> None:
    weight = nn.Parameter(weight.clone())
    penalty = SpectralNormPenalty(solver=solver)
    sigma = torch.linalg.matrix_norm(weight.detach().double(), 2).item()
    assert penalty([weight]).item() == pytest.approx(sigma**2, rel=1e-4)
    (gradient,) = gradients(penalty, [weight])
    assert torch.linalg.matrix_norm(gradient).item() == pytest.approx(2 * sigma, rel=1e-4)


@SOLVERS
def test_square_beyond_float32_is_inf(solver: str) -> None:
    weight = 1e18 * torch.ones(64, 64)
    assert SpectralNormPenalty(solver=solver)(weight).item() == math.inf
    assert SpectralNormPenalty(solver=solver)(weight.double()).item() == pytest.approx(64e18**2)


@SOLVERS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_the_sum_nan_leaves_the_rest_and_passes(solver: str, bad: float) -> None:
    good, broken = dominated((4, 16), (4, 16))
    healthy = broken.detach().clone()
    penalty = SpectralNormPenalty(solver=solver)
    expected = penalty([good, broken]).item()
    with torch.no_grad():
        broken[1, 2] = bad
    for first in (penalty, SpectralNormPenalty(solver=solver)):
        assert first([good, broken]).isnan()
        of_good, of_broken = gradients(first, [good, broken])
        assert of_good.isfinite().all()
        assert of_broken.isnan().any()
    with torch.no_grad():
        broken.copy_(healthy)
    for _ in range(6):
        value = penalty([good, broken])
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_iteration_leaves_an_old_direction_by_itself() -> None:
    # on a diagonal matrix a power iterate that sits in the old top direction would never leave it
    penalty = SpectralNormPenalty()
    penalty([torch.diag(torch.tensor([3.0, 1.0]))])
    for _ in range(12):
        value = penalty([torch.diag(torch.tensor([1.0, 3.0]))])
    assert value.item() == pytest.approx(9, rel=1e-3)


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_float32_under_autocast_and_for_half_precision(solver: str, dtype: torch.dtype) -> None:
    weights = dominated((8, 32), (8, 32))
    expected = SpectralNormPenalty(solver=solver)(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = SpectralNormPenalty(solver=solver)(weights)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    half = [nn.Parameter(weight.detach().to(dtype)) for weight in weights]
    rounded = SpectralNormPenalty(solver=solver)([weight.float() for weight in half])
    penalty = SpectralNormPenalty(solver=solver)
    torch.testing.assert_close(penalty(half), rounded)
    assert [gradient.dtype for gradient in gradients(penalty, half)] == [dtype, dtype]
