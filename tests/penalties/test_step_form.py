"""The penalty's gradient added in place, against autograd."""

import pytest
import torch
from torch import Tensor

from spectral_router import SpectralRankPenalty
from spectral_router.penalties.step_form import add_gradients_, fits

SHAPES = [(4, 16), (4, 16), (16, 5), (8, 8), (80, 130), (130, 80), (2, 7)]
FORMS = {
    "as printed": {},
    "relative": {"relative": True},
    "targets": {"sigma_target": 0.5, "rank_target": 1.5},
    "initial norm": {"sigma_target": "initial", "relative": True},
    "hold": {"sigma_target": "initial", "rank_target": "initial", "relative": True},
    "one-sided": {"sigma_target": 0.9, "rank_target": 1.8, "one_sided": True},
}


def matrices(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) * scale * shape[1] ** -0.5 for shape in SHAPES]


def by_autograd(penalty: SpectralRankPenalty, weights: list[Tensor]) -> list[Tensor]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    return list(torch.autograd.grad(penalty(leaves), leaves))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("moved", [False, True], ids=["", "moved from the anchors"])
def test_as_autograd_has_it(form: dict, moved: bool) -> None:
    penalty, other = SpectralRankPenalty(**form), SpectralRankPenalty(**form)
    weights = matrices()
    if moved:
        for one in (penalty, other):
            one(weights)
        weights = [weight * (1 + 0.3 * torch.rand_like(weight)) for weight in weights]
    there = [torch.randn_like(weight) for weight in weights]
    got = [gradient.clone() for gradient in there]
    assert fits(other, weights)
    assert add_gradients_(other, weights, got, 0.7)
    for before, after, slope in zip(there, got, by_autograd(penalty, weights), strict=True):
        torch.testing.assert_close(after - before, 0.7 * slope, rtol=1e-9, atol=1e-11)
    for name, anchors in penalty.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), anchors)


def test_float32_to_its_precision() -> None:
    weights = matrices(torch.float32)
    got = [torch.zeros_like(weight) for weight in weights]
    assert add_gradients_(SpectralRankPenalty(), weights, got, 1.0)
    exact = by_autograd(SpectralRankPenalty(), [weight.double() for weight in weights])
    for gradient, slope in zip(got, exact, strict=True):
        assert (gradient.double() - slope).norm() <= 1e-4 * slope.norm() + 1e-6


def test_those_without_a_gradient_are_measured_and_left() -> None:
    weights = matrices()
    got = [torch.zeros_like(weight) if i % 2 else None for i, weight in enumerate(weights)]
    penalty = SpectralRankPenalty("initial")
    assert add_gradients_(penalty, weights, got, 1.0)
    assert penalty.anchor.isfinite().all()
    assert all(gradient is None or gradient.norm() > 0 for gradient in got[:5])


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, 1e-9, 1e9])
def test_what_needs_care_is_left_to_the_careful_form(bad: float) -> None:
    weights = matrices()
    weights[3] = torch.full_like(weights[3], bad)
    got = [torch.zeros_like(weight) for weight in weights]
    penalty = SpectralRankPenalty("initial")
    assert not add_gradients_(penalty, weights, got, 1.0)
    assert all(gradient.norm() == 0 for gradient in got)
    assert penalty.anchor is None


def test_what_it_is_not_for() -> None:
    weights = matrices()
    assert not fits(SpectralRankPenalty(center=True), weights)
    assert not fits(SpectralRankPenalty(solver="power"), weights)
    assert not fits(lambda ws: ws[0].sum(), weights)
    assert not fits(SpectralRankPenalty(), [weight.bfloat16() for weight in weights])
    assert not fits(SpectralRankPenalty(), [weight.to("meta") for weight in weights])


def test_equal_singular_values_give_a_subgradient() -> None:
    got = torch.zeros(24, 40, dtype=torch.float64)
    assert add_gradients_(SpectralRankPenalty(), [2 * torch.eye(24, 40, dtype=torch.float64)], [got], 1.0)
    # the rank is at its target, so what is left is 2 (sigma - 1) u v^T for some top pair of unit vectors
    torch.testing.assert_close(torch.linalg.matrix_norm(got), torch.tensor(2.0, dtype=torch.float64))
    assert torch.linalg.matrix_rank(got, rtol=1e-6) == 1


def test_where_inverse_iteration_cannot_be_had_all_vectors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = matrices()
    usual, other = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    assert add_gradients_(SpectralRankPenalty(), weights, usual, 1.0)
    failing = torch.linalg.cholesky_ex
    asked = []

    def cholesky_ex(matrix: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(matrix.shape)
        return failing(matrix)[0], torch.ones(len(matrix), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
    assert add_gradients_(SpectralRankPenalty(), weights, other, 1.0)
    assert asked == [(1, 80, 80), (1, 80, 80)]
    for one, two in zip(usual, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
