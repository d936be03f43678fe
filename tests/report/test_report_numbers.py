"""The numbers of one gate against their literal formulas, and the verdicts against gates that were made ill."""

import math

import pytest
import torch
from torch import Tensor

from spectral_router.report.certified import certified, certified_shares
from spectral_router.report.fresh import fresh
from spectral_router.report.gate_report import report_of
from spectral_router.report.geometry import geometry
from spectral_router.report.stored_gate import StoredGate

SHAPES = [(8, 64), (4, 4), (16, 8), (2, 32), (1, 8), (64, 256)]


def gate(k: int = 8, d: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


def words(weight: Tensor, bias: Tensor | None = None, **options) -> str:
    return report_of(StoredGate("layers.0.gate", "layers.0.gate.weight", weight, bias), **options).verdict


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_the_formulas(shape: tuple[int, int], scale: float) -> None:
    weight = gate(*shape) * scale + 0.3 * scale
    found, w = geometry(weight), weight.double()
    values = torch.linalg.svdvals(w)
    assert found.spectral_norm == pytest.approx(values[0].item(), rel=1e-6)
    assert found.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-6)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist())), rel=1e-5)
    assert found.condition == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)
    rest = torch.linalg.svdvals(w - w.mean(0))
    if shape[0] > 1:
        assert found.centred_stable_rank == pytest.approx((rest.square().sum() / rest[0] ** 2).item(), rel=1e-5)
    else:
        assert found.centred_stable_rank == 0
    assert found.common == pytest.approx((shape[0] * w.mean(0).square().sum() / w.square().sum()).item(), rel=1e-6)
    assert found.row_norms.tolist() == pytest.approx(w.norm(dim=1).tolist(), rel=1e-6)
    for i in range(shape[0]):
        for j in range(shape[0]):
            assert found.distances[i, j].item() == pytest.approx((w[i] - w[j]).norm().item(), rel=1e-5, abs=1e-6 * scale)
            assert found.cosines[i, j].item() == pytest.approx((w[i] @ w[j] / w[i].norm() / w[j].norm()).item(), abs=1e-5)


def test_degenerate_matrices_have_finite_numbers() -> None:
    zero, one = geometry(torch.zeros(4, 8)), geometry(torch.ones(4, 1) * torch.arange(1.0, 9))
    assert (zero.spectral_norm, zero.stable_rank, zero.effective_rank, zero.centred_stable_rank) == (0, 0, 0, 0)
    assert (one.stable_rank, one.centred_stable_rank) == pytest.approx((1, 0))
    assert one.condition == float("inf")
    assert one.common == pytest.approx(1)


def test_distances_of_near_equal_rows_are_no_rounding() -> None:
    weight = gate().double()
    weight[3] = weight[5] + 1e-9 * gate(1, 64, 1)[0]
    assert geometry(weight).distances[3, 5].item() == pytest.approx((weight[3] - weight[5]).norm().item(), rel=1e-3)


@pytest.mark.parametrize(("k", "d"), [(8, 64), (8, 4096), (64, 512), (128, 2048), (4, 16), (16, 8), (2, 16), (3, 32)])
def test_fresh_gates_are_healthy(k: int, d: int) -> None:
    """No false alarm in 40 gates of each shape, of both usual starts."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(1000 + seed)
        assert words(torch.randn(k, d, generator=generator) * 0.02) == "healthy", seed
        assert words((torch.rand(k, d, generator=generator) * 2 - 1) / d**0.5) == "healthy", seed


def test_fresh_numbers_hold_for_a_gate_that_they_were_not_drawn_with() -> None:
    inside = total = 0
    for seed in range(40):
        found = geometry(gate(8, 64, 500 + seed))
        for name, (low, _, high) in fresh(8, 64).items():
            inside += low <= getattr(found, name) <= high
            total += 1
    assert 0.8 < inside / total < 0.97  # 0.9 but for the draws


def test_each_verdict_has_its_gate() -> None:
    weight = gate()
    assert words(weight) == "healthy"
    assert words(torch.zeros(8, 64)) == "zero"
    assert words(weight.clone().index_fill_(0, torch.tensor([2]), torch.nan)) == "broken"
    line = torch.linspace(-1, 1, 8)[:, None] * gate(1, 64, 1) + 0.05 * weight
    assert words(line) == "collapsed"
    assert words(gate(1, 64, 1) + 0.05 * weight) == "collapsed"
    few = gate(64, 256) + gate(64, 1, 1) @ gate(1, 256, 2)
    assert words(few) == "narrow"
    assert words(gate(64, 256) + 0.5 * gate(64, 1, 1) @ gate(1, 256, 2)) == "healthy"
    pair = weight.clone()
    pair[6] = pair[1] + 0.02 * gate(1, 64, 9)[0]
    assert words(pair) == "duplicates 1, 6"
    dead = weight.clone()
    dead[[3, 4]] *= 0.01
    assert words(dead) == "dead-looking 3, 4"  # and not duplicates
    loud = weight.clone()
    loud[0] *= 6
    assert words(loud).endswith("loud 0")
    bias = torch.zeros(8)
    bias[5] = -1.5
    assert words(weight, bias, top_k=2) == "closed 5"
    assert words(weight, bias, top_k=2, grouped=True) == "healthy"
    assert words(weight, bias / 2, top_k=2) == "healthy"


def test_many_experts_are_not_all_listed() -> None:
    dead = gate(32)
    dead[:12] *= 0.001
    assert words(dead).startswith("dead-looking 0, 1, 2, 3, 4, 5, 6, 7, ...")


def test_a_closed_expert_is_never_chosen() -> None:
    """The rule behind the word: no sigmoid score makes up for such a bias."""
    bias = torch.tensor([0.0, 0.1, -1.2, 0.3])
    assert words(gate(4, 64), bias, top_k=2) == "closed 2"
    scores = (10 * torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0))).sigmoid()
    assert not ((scores + bias).topk(2).indices == 2).any()


def test_certified_rows_stay_nearest_to_their_old_place() -> None:
    """Under random moves of every size: certified is always right, and not empty."""
    generator = torch.Generator().manual_seed(0)
    kept = lost = 0
    for trial in range(300):
        old = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        move = torch.randn(8, 6, generator=generator, dtype=torch.float64) * (0.02 + trial / 150)
        apart = torch.cdist(old, old)
        sure = certified(move.norm(dim=-1), apart)
        nearest = torch.cdist(old + move, old).argmin(-1)
        assert (nearest[sure] == torch.arange(8)[sure]).all()
        kept, lost = kept + int(sure.sum()), lost + int((nearest != torch.arange(8)).sum())
    assert kept > 300
    assert lost > 300


def test_the_bound_of_certified_is_sharp() -> None:
    """Right beyond half the distance, towards the other row, the nearest one is the other's."""
    old = gate(5, 7).double()
    i, j = divmod(int((torch.cdist(old, old) + torch.eye(5) * 1e9).argmin()), 5)
    new = old.clone()
    new[i] += 0.501 * (old[j] - old[i])
    assert torch.cdist(new, old).argmin(-1)[i] == j
    assert not certified((new - old).norm(dim=-1), torch.cdist(old, old))[i]


def test_rounding_keeps_far_rows_and_loses_near_ones() -> None:
    weight = gate()
    assert certified_shares(weight, geometry(weight).distances) == {"bf16": 1.0, "fp8": 1.0, "int8": 1.0}
    weight[1] = weight[0] + 0.01
    shares = certified_shares(weight, geometry(weight).distances)
    assert shares["bf16"] == 1.0
    assert shares["fp8"] == 0.75
