"""Hyperspherical energy: values, gradients, degenerate rows, minima."""

import itertools
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_energy_penalty import KINDS, RANDOM
from torch import Tensor, nn

from spectral_router import HypersphericalEnergyPenalty
from spectral_router.functional import hyperspherical_energy

ENERGIES = list(itertools.product((0, 1, 2), (False, True), (False, True)))
EPS = 1e-4


def apart(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Random rows, none of them in the tangents' range."""
    while True:
        weight = torch.randn(shape, dtype=torch.float64, generator=generator)
        unit = weight / weight.norm(dim=-1, keepdim=True)
        cosines = (unit @ unit.mT).abs() - 2 * torch.eye(shape[-2])
        if 2 - 2 * cosines.max() > 1e-3:
            return weight


def gradient(function, weight: Tensor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


# ---------------------------------------------------------------------------------------------------------------- values


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(2, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([1e-18, 1.0, 1e18]),
    kind=st.sampled_from(ENERGIES),
)
def test_value_and_gradient_are_those_of_the_double_loop(shape, dtype, scale: float, kind: tuple[int, bool, bool]) -> None:
    s, angular, half_space = kind
    weight = (scale * apart(*shape)).to(dtype)
    value = hyperspherical_energy(weight, s, angular=angular, half_space=half_space)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(value.double(), reference.hyperspherical_energy(weight, *kind), rtol=tolerance, atol=tolerance)
    ours = gradient(lambda w: hyperspherical_energy(w, s, angular=angular, half_space=half_space), weight)
    theirs = gradient(lambda w: reference.hyperspherical_energy(w, *kind), weight.double())
    error = (ours.double() - theirs).norm() * scale
    assert error <= (2e-2 if dtype == torch.bfloat16 else tolerance) * (1 + theirs.norm() * scale)


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (9, 3), (6, 40)])
def test_every_energy_of_every_kind_of_shape(kind: tuple[int, bool, bool], shape: tuple[int, int]) -> None:
    weight = torch.stack([apart(*shape), apart(*shape)])
    values = hyperspherical_energy(weight, kind[0], angular=kind[1], half_space=kind[2])
    torch.testing.assert_close(values, torch.stack([reference.hyperspherical_energy(matrix, *kind) for matrix in weight]))


def test_known_values() -> None:
    simplex = torch.eye(4) - 0.25
    for s, expected in ((0, -0.5 * math.log(8 / 3)), (1, math.sqrt(3 / 8)), (2, 3 / 8)):
        assert hyperspherical_energy(simplex, s).item() == pytest.approx(expected, rel=1e-5)
        assert hyperspherical_energy(torch.eye(3, 8), s, angular=True, half_space=True).item() == pytest.approx(
            -math.log(math.pi / 2) if s == 0 else (math.pi / 2) ** -s, rel=1e-5
        )
    assert hyperspherical_energy(torch.randn(2, 5, 1, 7)).tolist() == torch.zeros(2, 5).tolist()  # one row has no pair
    assert hyperspherical_energy(torch.randn(1, 7), half_space=True) == 0


@pytest.mark.parametrize("kind", ENERGIES)
def test_leading_dimensions_scale_and_sign(kind: tuple[int, bool, bool]) -> None:
    weight = torch.randn(2, 3, 4, 9)
    values = hyperspherical_energy(weight, kind[0], angular=kind[1], half_space=kind[2])
    assert values.shape == (2, 3)
    scaled = weight * torch.tensor([1e-3, 1.0, -1.0 if kind[2] else 7.0, 1e4])[:, None]
    torch.testing.assert_close(hyperspherical_energy(scaled, kind[0], angular=kind[1], half_space=kind[2]), values)


def test_autocast_changes_nothing() -> None:
    weight = torch.randn(4, 64)
    for penalty in (HypersphericalEnergyPenalty(), HypersphericalEnergyPenalty(**RANDOM).eval()):
        expected = penalty(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(penalty(weight), expected)


# ------------------------------------------------------------------------------------------------------------ degenerate


DEGENERATE = {
    "duplicates": torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]),
    "parallel": torch.tensor([[1.0, 2.0, 3.0], [7.0, 14.0, 21.0], [0.5, -1.0, 0.0]]),
    "antipodal": torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [0.5, -1.0, 0.0]]),
    "zero row": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.5, -1.0, 0.0]]),
    "zero": torch.zeros(3, 3),
    "one dimension": torch.tensor([[1.0], [2.0], [-3.0]]),
}


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_matrices_are_finite(kind: tuple[int, bool, bool], name: str, dtype: torch.dtype) -> None:
    def energy(weight: Tensor) -> Tensor:
        return hyperspherical_energy(weight, kind[0], angular=kind[1], half_space=kind[2])

    weight = DEGENERATE[name].to(dtype)
    assert energy(weight).isfinite()
    assert energy(weight) <= 2.1 / EPS
    slopes = gradient(energy, weight)
    assert slopes.isfinite().all()
    if "zero" in name:
        assert (slopes[1] == 0).all()
    # at exact duplicates there is no direction: what is left is the pull of the third row, and rounding
    assert slopes.norm() < (100 if dtype == torch.float32 else 10)


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("gap", [1e-5, 1e-3, 9e-3, 1.1e-2])
def test_near_duplicates_repel(kind: tuple[int, bool, bool], gap: float) -> None:
    """Below the floor as above it the gradient is that of the value, and it parts the rows."""
    weight = torch.tensor([[1.0, 0.0, 0.0], [1.0, gap, 0.0]], dtype=torch.float64)

    def energy(matrix: Tensor) -> Tensor:
        return hyperspherical_energy(matrix, kind[0], angular=kind[1], half_space=kind[2])

    slopes = gradient(energy, weight)
    assert slopes[0, 1] > 0 > slopes[1, 1]  # downhill is apart
    assert torch.autograd.gradcheck(energy, weight.requires_grad_(), eps=1e-3 * gap, atol=0.1, rtol=1e-3)
    in_float32 = gradient(energy, weight.float())
    torch.testing.assert_close(in_float32[:, 1].double(), slopes[:, 1], rtol=0.02 + 1e-6 / gap, atol=1e-3)


@pytest.mark.parametrize("kind", ENERGIES)
def test_the_floor_is_seamless(kind: tuple[int, bool, bool]) -> None:
    """Value and slope agree on both sides of r² = eps, and the energy falls all the way."""
    half_angle = torch.asin(torch.tensor([0.0, 0.5, 0.999, 1.001, 2.0], dtype=torch.float64) * math.sqrt(EPS) / 2)
    rows = torch.stack([torch.stack([half_angle.cos(), sign * half_angle.sin()], -1) for sign in (1, -1)], -2)
    values = hyperspherical_energy(rows, kind[0], angular=kind[1], half_space=kind[2])
    assert (values.diff() < 0).all()
    assert abs(values[2] / values[3] - 1) < 0.01
    slopes = gradient(lambda w: hyperspherical_energy(w, kind[0], angular=kind[1], half_space=kind[2]), rows)[:, 0, 1]
    assert abs(slopes[2] / slopes[3] - 1) < 0.01


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ENERGIES)
def test_not_finite_gives_nan_there_only(kind: tuple[int, bool, bool], broken: float) -> None:
    weight = torch.randn(3, 4, 5)
    weight[1, 2, 3] = broken
    values = hyperspherical_energy(weight, kind[0], angular=kind[1], half_space=kind[2])
    assert values.isnan().tolist() == [False, True, False]
    assert hyperspherical_energy(torch.full((1, 3), broken), kind[0], angular=kind[1], half_space=kind[2]).isnan()


@KINDS
def test_a_broken_gate_makes_the_sum_nan_and_leaves_the_others(options: dict[str, object]) -> None:
    good, bad = (nn.Parameter(torch.randn(4, 16)) for _ in range(2))
    with torch.no_grad():
        bad[0, 0] = math.nan
    penalty = HypersphericalEnergyPenalty(**options)
    total = penalty([good, bad])
    assert total.isnan()
    of_good, of_bad = torch.autograd.grad(total, [good, bad])
    assert of_good.isfinite().all()
    assert of_bad.isnan().any()
    assert penalty([good, good]).isfinite()  # nothing broken was remembered


# ---------------------------------------------------------------------------------------------------------------- minima


def descended(weight: Tensor, steps: int = 400, **options) -> Tensor:
    """Cosines off the diagonal after gradient descent."""
    leaf, penalty = weight.clone().requires_grad_(), HypersphericalEnergyPenalty(**options)
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        penalty([leaf]).backward()
        optimizer.step()
    unit = (leaf / leaf.norm(dim=-1, keepdim=True)).detach()
    return (unit @ unit.mT)[~torch.eye(len(unit), dtype=torch.bool)]


@pytest.mark.parametrize(("s", "angular"), [(0, False), (1, False), (2, False), (1, True), (2, True)])
def test_minimum_is_the_simplex(s: int, angular: bool) -> None:
    torch.testing.assert_close(descended(torch.randn(4, 3), s=s, angular=angular), torch.full((12,), -1 / 3), atol=5e-3, rtol=0)


def test_the_logarithm_of_angles_prefers_opposite_rows_to_the_simplex() -> None:
    opposite = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    for s, prefers in ((0, True), (1, False), (2, False)):
        of_opposite, of_simplex = (hyperspherical_energy(rows, s, angular=True) for rows in (opposite, torch.eye(4) - 0.25))
        assert (of_opposite < of_simplex) == prefers


@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (4, 9)])
def test_half_space_minimum_is_orthogonal(shape: tuple[int, int], angular: bool) -> None:
    cosines = descended(torch.randn(shape), half_space=True, angular=angular)
    torch.testing.assert_close(cosines, torch.zeros_like(cosines), atol=5e-3, rtol=0)


def test_near_duplicates_come_apart() -> None:
    weight = torch.randn(1, 16) + 1e-4 * torch.randn(4, 16)
    # not further in 400 steps: Adam remembers how large the gradient was
    assert descended(weight).max() < 0.9


@KINDS
def test_projected_energies_spread_the_rows(options: dict[str, object]) -> None:
    weight = torch.randn(1, 24) + 0.3 * torch.randn(6, 24)
    start = descended(weight, steps=0).min()
    assert start > 0.85
    assert descended(weight, steps=100, half_space=True, **options).abs().mean() < 0.9 * start
