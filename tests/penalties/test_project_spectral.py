"""project_spectral_: the polar factor, in place."""

import math

import operations
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty
from spectral_router.penalties.project_spectral import _GROW, project_spectral_

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def matrix(rows: int, columns: int, values: Tensor) -> Tensor:
    """A float64 matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))[0]
    return left @ values.double().diag() @ right.mT


def projected(weight: Tensor, *args: float, **options: int) -> Tensor:
    copy = weight.clone()
    project_spectral_(copy, *args, **options)
    return copy


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9)),
    dtype=st.sampled_from(list(TOLERANCE)),
    sigma_target=st.sampled_from([0.0, 0.5, 1.0, 20.0]),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e18]),
    seed=st.integers(0, 1000),
)
def test_is_the_polar_factor(shape, dtype: torch.dtype, sigma_target: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = ((1.0 if dtype == torch.float16 else scale) * torch.randn(shape)).to(dtype)
    expected = sigma_target * reference.polar_factor(weight)
    out = projected(weight, sigma_target)
    assert out.dtype == dtype
    atol = TOLERANCE[dtype] * (sigma_target or 1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1, 1e1, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (130, 64)])
def test_exact_at_every_condition_number(dtype: torch.dtype, condition: float, shape: tuple[int, int]) -> None:
    rank, spectra = min(shape), []
    spectra.append(condition ** -torch.linspace(0, 1, rank, dtype=torch.float64))
    spectra.append(torch.cat([spectra[0][:1], spectra[0][-1:].expand(rank - 1)]))
    spectra.append(torch.cat([spectra[0][:1].expand(rank - 1), spectra[0][-1:]]))
    for values in spectra:
        weight = matrix(*shape, values).to(dtype)
        out = projected(weight).double()
        error = (out - reference.polar_factor(weight)).abs().max()
        assert error < (1e-7 if dtype == torch.float32 else 2e-14 * condition)
        levels = torch.linalg.svdvals(out)
        assert levels[0] / levels[-1] - 1 < (2e-7 if dtype == torch.float32 else 2e-14)


@pytest.mark.parametrize(("steps", "condition"), [(0, 1.1), (6, 1e3), (12, 1e6)])
def test_steps_reach_the_condition_numbers_told(steps: int, condition: float) -> None:
    for rows in (4, 100):
        weight = matrix(rows, 100, condition ** -torch.linspace(0, 1, rows, dtype=torch.float64))
        levels = torch.linalg.svdvals(projected(weight, steps=steps))
        assert (levels - 1).abs().max() < 1e-13


def test_growth_keeps_what_has_arrived() -> None:
    values = torch.linspace(0, 1, 100001, dtype=torch.float64)
    a, b, c = _GROW
    grown = a * values + b * values**3 + c * values**5
    assert 0 <= grown.min() <= grown.max() < 1
    assert grown[values >= 0.48].min() > 0.48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_penalty_is_zero_afterwards_and_again_changes_nothing(dtype: torch.dtype) -> None:
    weights = [torch.randn(shape).to(dtype) for shape in ((4, 16), (8, 3), (4, 16), (1, 7), (5, 5))]
    weights.append(torch.randn(2, 3, 4, 9).to(dtype))
    before = SpectralRankPenalty(2.0)(weights)
    project_spectral_(weights, 2.0)
    assert SpectralRankPenalty(2.0)(weights) < (1e-2 if dtype == torch.bfloat16 else 1e-9) < before
    once = [weight.clone() for weight in weights]
    project_spectral_(iter(weights), 2.0, steps=0)
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(weights, once, rtol=tolerance, atol=tolerance)
    for weight, alone in zip(weights, once, strict=True):
        torch.testing.assert_close(projected(alone, 2.0), weight, rtol=tolerance, atol=tolerance)


def test_it_is_the_nearest_zero_of_the_penalty() -> None:
    weight = torch.randn(4, 9, dtype=torch.float64)
    out = projected(weight, 1.5)
    for _ in range(20):
        other = 1.5 * matrix(4, 9, torch.ones(4))
        near = projected(out + 0.01 * torch.randn_like(out), 1.5)
        assert (weight - out).norm() < min((weight - other).norm(), (weight - near).norm())


def test_zero_and_rank_deficient_matrices() -> None:
    assert torch.equal(projected(torch.zeros(3, 4, 6)), torch.zeros(3, 4, 6))
    for rank in (1, 2):
        weight = matrix(5, 9, torch.arange(1, rank + 1))
        out = projected(weight)
        torch.testing.assert_close(out, reference.polar_factor(weight), rtol=0, atol=1e-7)
        assert out.isfinite().all()
    row = torch.randn(6)
    torch.testing.assert_close(projected(row.expand(4, 6).clone()), (row / row.norm() / 2).expand(4, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_out_for_that_matrix_alone(value: float) -> None:
    weight = torch.randn(3, 4, 6)
    expected = projected(weight)
    weight[1, 2, 3] = value
    out = projected(weight)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])


def test_training_on_orthonormal_rows() -> None:
    weight, target = nn.Parameter(torch.randn(4, 8)), torch.randn(4, 8)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        optimizer.step()
        moments = {name: value.clone() for name, value in optimizer.state[weight].items()}
        project_spectral_(weight)
        losses.append(loss.item())
        assert all(torch.equal(value, optimizer.state[weight][name]) for name, value in moments.items())
        torch.testing.assert_close(weight @ weight.mT, torch.eye(4), rtol=0, atol=1e-6)
    assert weight.requires_grad
    assert weight.grad_fn is None
    optimum = (reference.polar_factor(target) - target).square().sum().item()
    assert losses[-1] == pytest.approx(optimum, rel=1e-4)


def test_views_are_written_through() -> None:
    linear = nn.Linear(3, 8)
    project_spectral_([linear.weight.mT])
    torch.testing.assert_close(linear.weight.mT @ linear.weight, torch.eye(3))


def test_products_only_and_as_many_for_any_number_of_gates() -> None:
    counts = []
    for number in (2, 20):
        with operations.Operations() as seen:
            project_spectral_([torch.randn(4, 8) for _ in range(number)])
        counts.append(seen.count)
        assert not (operations.SYNCHRONISING | operations.FACTORISING) & set(seen.count)
    assert counts[0]["bmm"] == counts[1]["bmm"] > 0


def test_autocast_changes_nothing() -> None:
    weight = torch.randn(4, 16)
    expected = projected(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projected(weight), expected)


@pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    weights = [torch.randn(shape) for shape in ((4, 16), (8, 5), (4, 16))]
    expected = [projected(weight) for weight in weights]
    torch.compile(project_spectral_, fullgraph=True, backend="aot_eager")(weights)
    torch.testing.assert_close(weights, expected)
    torch.compiler.reset()


def test_messages() -> None:
    weight = torch.eye(3)
    with pytest.raises(TypeError, match=r"sigma_target must be a number, got sigma_target='initial'"):
        project_spectral_(weight, "initial")
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sigma_target must be a finite number of at least 0, got sigma_target={value}"):
            project_spectral_(weight, value)
    for steps in (-1, 1.5):
        with pytest.raises(ValueError, match=f"steps must be a whole number of at least 0, got steps={steps}"):
            project_spectral_(weight, steps=steps)
    with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
        project_spectral_([])
    with pytest.raises(ValueError, match=r"weights must be matrices \(experts, dim\), got shape \(4,\) at position 1"):
        project_spectral_([weight, torch.ones(4)])
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        project_spectral_(torch.ones(3, 4, dtype=torch.int64))
    assert torch.equal(weight, torch.eye(3))
