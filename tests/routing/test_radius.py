"""`choice_radius` against brute force: bisection along the worst direction, and random changes within."""

import pytest
import torch
from torch import Tensor

from spectral_router import PrototypeRouter
from spectral_router.functional import choice_radius
from spectral_router.routing.rounding import ROUNDINGS, flipped_shares

METRICS = ["dot", "euclidean", "cosine"]


def scores(x: Tensor, weight: Tensor, metric: str, bias: Tensor | None) -> Tensor:
    if metric == "euclidean":
        return -torch.cdist(x, weight, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "cosine":
        return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(weight, dim=-1).mT
    return x @ weight.mT + (0 if bias is None else bias)


def chosen(x: Tensor, weight: Tensor, metric: str, bias: Tensor | None, top_k: int) -> Tensor:
    """(*, K) of booleans."""
    values = scores(x, weight, metric, bias)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(top_k).indices, True)


def least_change(x: Tensor, weight: Tensor, metric: str, bias: Tensor | None, top_k: int) -> float:
    """By bisection, along the direction from each row to each other, how far x has to go until its choice is another."""
    usual, least = chosen(x, weight, metric, bias, top_k), float("inf")
    rows = torch.nn.functional.normalize(weight, dim=-1) if metric == "cosine" else weight
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i == j:
                continue
            step = (rows[j] - rows[i]) / (rows[j] - rows[i]).norm()
            low, high = 0.0, 100.0
            if (chosen(x + high * step, weight, metric, bias, top_k) == usual).all():
                continue
            for _ in range(60):
                middle = (low + high) / 2
                if (chosen(x + middle * step, weight, metric, bias, top_k) == usual).all():
                    low = middle
                else:
                    high = middle
            least = min(least, high)
    return least


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_radius_is_the_least_change_that_bisection_finds(metric: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        bias = torch.randn(5, generator=generator, dtype=torch.float64) if metric == "dot" else None
        x = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        radius = choice_radius(x, weight, top_k, bias=bias, metric=metric).item()
        assert radius == pytest.approx(least_change(x, weight, metric, bias, top_k), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_no_change_within_the_radius_changes_the_choice(metric: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    radius = choice_radius(x, weight, top_k, metric=metric)
    step = torch.nn.functional.normalize(torch.randn(2000, 50, 3, generator=generator, dtype=torch.float64), dim=-1)
    usual = chosen(x, weight, metric, None, top_k)
    within = chosen(x + 0.9999 * radius[:, None] * step, weight, metric, None, top_k)
    assert (within == usual).all()
    beyond = chosen(x + 1.5 * radius[:, None] * step, weight, metric, None, top_k)
    assert ((beyond != usual).any(-1).any(0)).float().mean() > 0.9


def test_ties_duplicates_and_all_experts() -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert choice_radius(x, weight, 1).tolist() == [0, 0]  # the first two are equal
    assert choice_radius(x, weight, 2).tolist() == pytest.approx([2**-0.5, 0])
    assert choice_radius(x, weight, 3).tolist() == [float("inf")] * 2
    apart = torch.tensor([0.5, 0.0, 0.0])  # equal rows that a bias parts: no change of x can part them otherwise
    assert choice_radius(x[:1], weight[:2], 1, bias=apart[:2]).item() == float("inf")


def test_shapes_dtypes_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(4, 8)
    whole = choice_radius(x, weight, 2)
    assert whole.shape == (3, 5)
    assert choice_radius(x.bfloat16(), weight.bfloat16(), 2).dtype == torch.float32
    assert choice_radius(x.double(), weight, 2).dtype == torch.float64
    monkeypatch.setattr("spectral_router.routing.radius._AT_ONCE", 16)
    assert torch.equal(choice_radius(x, weight, 2), whole)


def test_it_is_that_of_the_prototype_router() -> None:
    router = PrototypeRouter(6, 5, top_k=1)
    x = torch.randn(40, 6)
    radius = choice_radius(x, router.prototypes, 1, metric="euclidean")
    usual = router(x).indices
    step = torch.nn.functional.normalize(torch.randn(40, 6), dim=-1)
    assert torch.equal(router(x + 0.99 * radius[:, None] * step).indices, usual)


def test_messages() -> None:
    x, weight = torch.zeros(2, 4), torch.eye(3, 4)
    with pytest.raises(ValueError, match=r"metric must be one of dot, euclidean, sqeuclidean, cosine, got metric='l1'"):
        choice_radius(x, weight, metric="l1")
    with pytest.raises(ValueError, match=r"\(\*, D\) and a weight \(K, D\) are needed, got \(2, 4\) and \(4, 3\)"):
        choice_radius(x, weight.mT)
    with pytest.raises(ValueError, match=r"top_k must be a whole number between 1 and num_experts, got top_k=4"):
        choice_radius(x, weight, 4)


def test_flips_happen_to_near_ties_and_to_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    x = torch.randn(4000, 64, generator=generator)
    shares = flipped_shares(x, weight, 2)
    assert 0 < shares["bf16"] < shares["int8"] < shares["fp8"] < 0.3
    # a token whose radius, less what the weight's rounding does to its logits, exceeds its own rounding cannot flip
    radius = choice_radius(x, weight, 2)
    sure = x[radius > 0.8]
    assert len(sure) > 20
    assert flipped_shares(sure, weight, 2) == {"bf16": 0.0, "fp8": 0.0, "int8": 0.0}


@pytest.mark.parametrize(("name", "error"), [("bf16", 2**-8), ("fp8", 2**-4), ("int8", 1 / 254)])
def test_roundings_are_as_near_as_their_formats(name: str, error: float) -> None:
    x = torch.randn(50, 64)
    change = (ROUNDINGS[name](x) - x).abs()
    bound = error * (x.abs().amax(-1, keepdim=True) if name == "int8" else x.abs().clamp_min(x.abs().amax() * 2**-14))
    assert (change <= bound * 1.01).all()
    assert change.max() > 0
    assert torch.equal(ROUNDINGS[name](torch.zeros(2, 3)), torch.zeros(2, 3))
