"""rescue_collapsed_: which rows it re-seeds, where to, and what training makes of them."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, PrototypeRouter, SpectralRankPenalty
from spectral_router.functional import stable_rank
from spectral_router.routing.rescue import rescue_collapsed_

# ------------------------------------------------------------------------------------------------------------------ which


@given(
    seed=st.integers(0, 1000),
    kinds=st.lists(st.sampled_from(["own", "copy", "near", "small", "zero", "nan", "inf"]), min_size=1, max_size=8),
    dim=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-18, 1.0, 1e18]),
    use_share=st.booleans(),
)
def test_mask_is_that_of_the_rule(seed: int, kinds: list[str], dim: int, dtype, scale: float, use_share: bool) -> None:
    torch.manual_seed(seed)
    rows = []
    for kind in kinds:
        row, earlier = torch.randn(dim).sign() + torch.randn(dim), rows[-1] if rows else torch.ones(dim)
        factor = {"small": 1e-9, "zero": 0.0, "nan": math.nan, "inf": math.inf}.get(kind, 1.0)
        rows.append({"copy": earlier, "near": earlier * (1 + 1e-6)}.get(kind, row) * factor)
    weight = scale * torch.stack(rows).to(dtype)
    share = torch.rand(len(kinds)) * (torch.rand(len(kinds)) > 0.3) if use_share else None
    if share is not None:
        share[torch.rand(len(kinds)) > 0.8] = math.nan
    expected = reference.collapsed_rows(weight, None if share is None else share.tolist(), 0.01, 0.02)
    before = weight.clone()
    mask = rescue_collapsed_(weight, share=share, dead=0.02)
    assert mask.tolist() == expected
    assert torch.equal(weight[~mask], before[~mask])  # bit for bit
    assert weight.isfinite().all()
    assert dim == 1 or not (weight[mask] == before[mask]).all(-1).any()  # of one dimension there are two directions


def test_nothing_collapsed_nothing_changed() -> None:
    weight = nn.Parameter(torch.randn(6, 16))
    before, version = weight.detach().clone(), weight._version
    mask = rescue_collapsed_(weight, share=torch.ones(6), x=torch.randn(9, 16))
    assert not mask.any()
    assert mask.shape == (6,)
    assert mask.dtype == torch.bool
    assert torch.equal(weight, before)
    assert weight._version == version


def test_the_first_live_one_of_a_group_stays() -> None:
    weight = torch.randn(1, 8).repeat(4, 1)
    assert rescue_collapsed_(weight.clone()).tolist() == [False, True, True, True]
    # the row that holds the tokens is not thrown out for a dead one before it
    assert rescue_collapsed_(weight, share=torch.tensor([0.0, 5.0, 0.0, 5.0])).tolist() == [True, False, True, True]
    assert not rescue_collapsed_(torch.randn(3, 8), share=torch.zeros(3)).any()


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_a_share_that_is_not_finite_says_nothing(nothing: float) -> None:
    weight = torch.randn(4, 8)
    share = torch.tensor([nothing, 0.0, 4.0, 0.05])  # an even one is 1.35
    assert rescue_collapsed_(weight.clone(), share=share, dead=0.03).tolist() == [False, True, False, False]
    assert rescue_collapsed_(weight.clone(), share=share, dead=0.04).tolist() == [False, True, False, True]
    assert not rescue_collapsed_(weight.clone(), share=torch.full((4,), nothing)).any()


def test_one_prototype_of_nan_is_rescued_alone() -> None:
    router, x = PrototypeRouter(8, 4), torch.randn(50, 8)
    router.prototypes.data[2] = math.nan
    share = router(x).probs.mean(0)
    assert share.isnan().all()
    assert rescue_collapsed_(router.prototypes, share=share, x=x).tolist() == [False, False, True, False]
    assert router(x).probs.isfinite().all()


def test_cosine_sees_directions() -> None:
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    assert rescue_collapsed_(weight.clone()).tolist() == [False] * 4
    assert rescue_collapsed_(weight, metric="cosine").tolist() == [False, True, False, False]


def test_tolerance() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.95, 0.0], [0.0, 1.0]])
    assert rescue_collapsed_(weight.clone()).sum() == 0
    assert rescue_collapsed_(weight.clone(), tolerance=0.1).tolist() == [False, True, False]
    assert rescue_collapsed_(weight[[0, 0, 1]], tolerance=0).tolist() == [False, True, False]
    # the unit is that of the finite rows, here 1
    weight = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [math.cos(0.4), math.sin(0.4)]])
    assert rescue_collapsed_(weight.clone(), tolerance=0.35).tolist() == [False, True, True, False]
    assert rescue_collapsed_(weight, tolerance=0.45).tolist() == [False, True, True, True]


# ------------------------------------------------------------------------------------------------------------------ where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_new_rows_are_orthogonal_and_as_long(dtype: torch.dtype, scale: float) -> None:
    weight = (scale * torch.randn(3, 8)).to(dtype)[[0, 1, 0, 2, 1, 0]]
    mask = rescue_collapsed_(weight)
    assert mask.tolist() == [False, False, True, False, True, True]
    assert weight.dtype == dtype
    rows = weight.double()
    norm = rows[~mask].square().sum(-1).mean().sqrt()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(rows[mask] @ rows[mask].mT / norm**2, torch.eye(3).double(), rtol=0, atol=tolerance)
    assert (rows[mask] @ rows[~mask].mT / norm**2).abs().max() < tolerance


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_without_a_row_that_stays_rows_are_orthonormal(value: float) -> None:
    weight = torch.full((3, 5), value)
    assert rescue_collapsed_(weight).all()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(3))


@pytest.mark.parametrize("kept", [1, 2, 6])
def test_more_experts_than_dimensions(kept: int) -> None:
    start = torch.randn(kept, 4)
    weight = torch.cat([start, start[:1].repeat(8 - kept, 1)])
    mask = rescue_collapsed_(weight)
    assert mask.sum() == 8 - kept
    assert not rescue_collapsed_(weight.clone()).any()
    free = max(0, 4 - kept)
    new = weight[mask][:free]
    assert (new @ start.mT).abs().max() < 1e-5 if free else True
    assert stable_rank(weight) > 1.5
    # rows that stay but share few directions leave the others free
    flat = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [5.0]]) @ torch.randn(1, 3)
    assert rescue_collapsed_(flat).tolist() == [False] * 5 + [True]
    assert (flat[5] @ flat[0]).abs() < 1e-5 * flat[0].norm() * flat[5].norm()


def test_inputs_far_from_the_rows_that_stay() -> None:
    centers = 10 * torch.eye(4, 6)
    x = (centers[:, None] + 0.01 * torch.randn(4, 50, 6)).reshape(2, 100, 6)
    weight = centers[:1].repeat(4, 1)
    mask = rescue_collapsed_(weight, x=x)
    assert mask.tolist() == [False, True, True, True]
    assert torch.cdist(weight, centers).argmin(0).sort().values.tolist() == [0, 1, 2, 3]  # one for each cluster
    assert all((x == row).all(-1).any() for row in weight[mask])
    zeros = torch.zeros(4, 6)
    assert rescue_collapsed_(zeros, x=x).all()
    assert torch.cdist(zeros, centers).argmin(0).sort().values.tolist() == [0, 1, 2, 3]
    along = torch.cat([centers[:2], 3 * centers[:2], 5 * centers[2:3]])  # only one direction is new
    for seed in range(10):
        weight = centers[[0, 1, 1]]
        rescue_collapsed_(weight, x=along, metric="cosine", generator=torch.Generator().manual_seed(seed))
        assert torch.equal(weight[2], along[4])


def test_inputs_that_are_all_one_vector() -> None:
    weight = torch.ones(3, 4)
    assert rescue_collapsed_(weight, x=torch.ones(5, 4)).sum() == 2
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("inputs", [False, True])
def test_equal_arguments_give_equal_results(inputs: bool) -> None:
    start, x = torch.randn(1, 8).repeat(4, 1), torch.randn(30, 8) if inputs else None
    state, results = torch.get_rng_state(), []
    for generator in (None, None, *(torch.Generator().manual_seed(seed) for seed in (7, 7, 8))):
        results.append(start.clone())
        rescue_collapsed_(results[-1], x=x, generator=generator)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[2], results[4])


# --------------------------------------------------------------------------------------------------------------- training


def train(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 200) -> float:
    penalty = SpectralRankPenalty(relative=True)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty([weight]).backward()
        optimizer.step()
    return stable_rank(weight).item()


@pytest.mark.parametrize("x", [None, 2 + torch.randn(40, 16, generator=torch.Generator().manual_seed(0))], ids=["free", "x"])
def test_training_leaves_a_collapsed_router_after_a_rescue_only(x: Tensor | None) -> None:
    weight = nn.Parameter(torch.randn(1, 16, dtype=torch.float64).repeat(6, 1) / 4)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert train(weight, optimizer) == pytest.approx(1, abs=1e-6)  # equation 5 has gradient zero at rank one
    assert rescue_collapsed_(weight, x=x, optimizer=optimizer).sum() == 5
    assert train(weight, optimizer) > 5.5


def test_dead_experts_get_tokens_again() -> None:
    x = torch.randn(4, 16)[torch.arange(400) % 4] + 0.1 * torch.randn(400, 16)
    router = PrototypeRouter(16, 4, top_k=1, temperature=0.1)
    with torch.no_grad():
        router.prototypes.copy_(torch.randn(4, 16) * 40)
        router.prototypes[2] = x.mean(0)
    share = router(x).probs.mean(0)
    assert (share > 0.01).tolist() == [False, False, True, False]
    assert LoadBalanceLoss()(router(x).probs) > 2.9
    assert rescue_collapsed_(router.prototypes, share=share, x=x).tolist() == [True, True, False, True]
    assert (router(x).probs.mean(0) > 0.05).all()
    assert LoadBalanceLoss()(router(x).probs) < 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_optimizer_state_of_new_rows_is_zero(kind: type) -> None:
    weight, other = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
    optimizer = kind([other, weight], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {"amsgrad": True}))
    (weight.square().sum() + other.square().sum()).backward()
    share = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert rescue_collapsed_(weight, share=share, optimizer=optimizer).any()  # before there is a state
    assert not optimizer.state
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    untouched = [value.clone() for value in optimizer.state[other].values()]
    mask = rescue_collapsed_(weight, share=share, optimizer=optimizer)
    moments = {name: value for name, value in optimizer.state[weight].items() if value.ndim}
    assert len(moments) == (1 if kind is torch.optim.SGD else 3)
    for name, value in moments.items():
        assert not value[mask].any()
        assert torch.equal(value[~mask], before[name][~mask])
        assert before[name].all()
    assert all(map(torch.equal, optimizer.state[other].values(), untouched))
    assert "step" not in before or torch.equal(optimizer.state[weight]["step"], before["step"])


# --------------------------------------------------------------------------------------------------------------- messages


def test_messages() -> None:
    weight, x = torch.zeros(3, 4), torch.randn(5, 4)
    for match, options in {
        r'metric must be "euclidean" or "cosine", got metric=\'dot\'': {"metric": "dot"},
        "tolerance must be at least 0 and below 1, got tolerance=-0.5": {"tolerance": -0.5},
        "dead must be at least 0 and below 1, got dead=1.0": {"dead": 1.0},
        r"share must have one entry an expert, shape \(3,\), got shape \(2,\)": {"share": torch.ones(2)},
        "share must be at least 0, got -1 of expert 1; pass mean probabilities": {"share": torch.tensor([1, -1, 1])},
        "share must be at least 0, got -inf of expert 2": {"share": torch.tensor([1.0, math.nan, -math.inf])},
        r"the last dimension of x must be dim=4, got shape \(5, 3\)": {"x": x[:, :3]},
        "x must hold at least num_experts=3 vectors, got 2": {"x": x[:2]},
        "x must be finite, got NaN or inf": {"x": x / 0},
        "optimizer must hold weight, got one that does not": {"optimizer": torch.optim.SGD([torch.zeros(3, 4)])},
    }.items():
        with pytest.raises(ValueError, match=match):
            rescue_collapsed_(weight, **options)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        rescue_collapsed_(weight, x=torch.ones(5, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        rescue_collapsed_(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight must be one matrix \(experts, dim\), got shape \(2, 3, 4\)"):
        rescue_collapsed_(torch.zeros(2, 3, 4))
    assert not weight.any()
