"""The two solvers of SpectralRankPenalty: what training ends at, the state of "power", and the operations of both."""

import copy
import pickle

import pytest
import torch
from operations import FACTORISING, SYNCHRONISING, count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_router import SpectralRankPenalty
from spectral_router.functional import spectral_norm, stable_rank

SHAPES = [(4, 16), (8, 3), (4, 16), (2, 2), (1, 7), (8, 3), (5, 1)]
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"center": True}, {"relative": True, "sigma_target": "initial"}, {"solver": "power"}],
    ids=["plain", "center", "initial", "power"],
)


def gates(*shapes: tuple[int, ...], scale: float = 1.0) -> list[nn.Parameter]:
    return [nn.Parameter(scale * torch.randn(shape)) for shape in shapes]


def iterates(penalty: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in penalty.named_buffers() if name.startswith("iterate")}


# ------------------------------------------------------------------------------------------- power gives what exact gives


def test_first_call_gives_the_exact_value() -> None:
    weights = gates(*SHAPES)
    exact, power = SpectralRankPenalty(), SpectralRankPenalty(solver="power")
    torch.testing.assert_close(power(weights), exact(weights), rtol=1e-4, atol=1e-5)
    # one dominant direction each, so that the gradient is unique
    for weight in weights:
        weight.data += 5 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    power = SpectralRankPenalty(solver="power")
    expected = torch.autograd.grad(exact(weights), weights)
    torch.testing.assert_close(torch.autograd.grad(power(weights), weights), expected, rtol=1e-3, atol=1e-3)


def test_power_follows_weights_in_training() -> None:
    # trained with the exact penalty; the power one looks on
    weights = gates((4, 16), (4, 16), (16, 8), scale=0.3)  # from a distance of 1.17 to one of 0.1
    exact, power = SpectralRankPenalty(relative=True), SpectralRankPenalty(relative=True, solver="power")
    optimizer = torch.optim.SGD(weights, lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        value = exact(weights)
        # the root of the relative penalty is a distance from the targets, in which errors of sigma and R add up as they are
        assert power(weights).sqrt().item() == pytest.approx(value.sqrt().item(), abs=1e-3)
        value.backward()
        optimizer.step()


def test_training_with_either_solver_follows_the_same_path() -> None:
    # each trains its own copy of the weights; both copies are judged by the exact penalty
    judge = SpectralRankPenalty(relative=True)
    paths = []
    for solver in ("exact", "power"):
        torch.manual_seed(0)
        weights = gates((16, 64), scale=1 / 8)
        penalty = SpectralRankPenalty(relative=True, solver=solver)
        optimizer = torch.optim.SGD(weights, lr=0.02)
        path = []
        for _ in range(200):
            path.append(judge(weights).item())
            optimizer.zero_grad()
            penalty(weights).backward()
            optimizer.step()
        paths.append(path)
    exact, power = paths
    assert exact[-1] < 0.8 * exact[0]  # far enough to tell
    assert power == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 64), (16, 8)])
def test_training_ends_at_orthogonal_rows(solver: str, rows: int, columns: int) -> None:
    weights = gates((rows, columns), (rows, columns), scale=0.3)
    penalty = SpectralRankPenalty(relative=True, solver=solver)
    optimizer = torch.optim.Adam(weights, lr=0.02)
    # the rank term is scale-free, so steps of constant size circle around the optimum
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        penalty(weights).backward()
        optimizer.step()
        schedule.step()
    for weight in weights:
        assert stable_rank(weight).item() == pytest.approx(min(rows, columns), abs=1e-2)
        assert spectral_norm(weight).item() == pytest.approx(1, abs=1e-2)


def test_two_iterations_a_step_let_the_penalty_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    # why the power solver makes so many iterations; the numbers of docs/numerics.md
    def trained() -> tuple[float, float]:
        torch.manual_seed(0)
        weights = gates((64, 512), scale=512**-0.5)
        judge, penalty = SpectralRankPenalty(relative=True), SpectralRankPenalty(relative=True, solver="power")
        before = judge(weights).item()
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        for _ in range(300):
            optimizer.zero_grad()
            penalty(weights).backward()
            optimizer.step()
        return before, judge(weights).item()

    before, after = trained()
    assert after < 1e-3 * before
    monkeypatch.setattr("spectral_router.penalties.spectrum._SQUARINGS", 0)
    before, after = trained()
    assert after > before


@pytest.mark.parametrize("bad", ["nan", "inf", "zero"])
def test_power_recovers_from_broken_weights(bad: str) -> None:
    weights = [torch.randn(3, 9), torch.randn(3, 9)]
    broken = [weights[0], torch.zeros(3, 9) if bad == "zero" else torch.full((3, 9), float(bad))]
    expected = SpectralRankPenalty()(weights).item()
    seen_late, seen_first = SpectralRankPenalty(solver="power"), SpectralRankPenalty(solver="power")
    seen_late(weights)
    for penalty in (seen_late, seen_first):
        assert penalty(broken).isfinite() == (bad == "zero")
        for _ in range(3):
            value = penalty(weights)
        assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{"sigma_target": "initial"}, {"solver": "power"}])
def test_a_first_call_in_inference_mode_keeps_nothing_and_training_works(options: dict[str, str]) -> None:
    # a sanity check before training; what is made in inference mode can never be updated in training
    weights, penalty = gates((4, 16), (4, 16)), SpectralRankPenalty(**options)
    with torch.inference_mode():
        before = penalty(weights).item()
    assert not dict(penalty.named_buffers())
    value = penalty(weights)
    assert value.item() == before
    value.backward()
    with torch.inference_mode():
        penalty(weights)
    penalty(weights).backward()


def test_power_finds_a_top_direction_orthogonal_to_its_iterate() -> None:
    # on a diagonal matrix a power iterate that sits in the old top direction never leaves it by itself
    penalty = SpectralRankPenalty(sigma_target=3.0, rank_target=1, solver="power")
    penalty([torch.diag(torch.tensor([3.0, 1.0]))])
    turned = [torch.diag(torch.tensor([1.0, 3.0]))]
    for _ in range(3):
        value = penalty(turned)
    torch.testing.assert_close(value, SpectralRankPenalty(sigma_target=3.0, rank_target=1)(turned))


# ---------------------------------------------------------------------------------------------------- state of the solver


def test_eval_mode_reads_without_storing() -> None:
    penalty = SpectralRankPenalty(solver="power")
    penalty(gates(*SHAPES))
    penalty.eval()
    before = iterates(penalty)
    penalty(gates(*SHAPES))
    torch.testing.assert_close(iterates(penalty), before, rtol=0, atol=0)
    penalty.train()
    penalty(gates(*SHAPES))
    assert not all(torch.equal(iterates(penalty)[name], before[name]) for name in before)


def test_iterates_and_anchors_are_copied_and_pickled() -> None:
    weights = gates(*SHAPES)
    penalty = SpectralRankPenalty("initial", solver="power")
    for _ in range(3):
        penalty(weights).backward()
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert len(iterates(twin)) == len(set(SHAPES))
        torch.testing.assert_close(dict(twin.named_buffers()), dict(penalty.named_buffers()), rtol=0, atol=0)
        torch.testing.assert_close(twin(weights), penalty.eval()(weights), rtol=0, atol=0)
        with pytest.raises(ValueError, match="every call must bring the matrices of the first call"):
            twin(weights[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_measurements_stay_in_full_precision_when_the_module_does_not(dtype: torch.dtype) -> None:
    penalty = SpectralRankPenalty("initial", solver="power")
    weights = gates(*SHAPES)
    penalty(weights)
    model = nn.ModuleDict({"penalty": penalty, "layer": nn.Linear(2, 2)})
    before = {name: buffer.clone() for name, buffer in penalty.named_buffers()}
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert model["layer"].weight.dtype == dtype
    torch.testing.assert_close(dict(penalty.named_buffers()), before, rtol=0, atol=0)
    assert penalty([weight.to(dtype) for weight in weights]).dtype == torch.float32


def test_state_dict_holds_anchors_but_no_iterates() -> None:
    penalty = SpectralRankPenalty("initial", solver="power")
    penalty(gates(*SHAPES))
    assert list(penalty.state_dict()) == ["anchor"]


# ------------------------------------------------------------------------------------------------------------- operations


@OPTIONS
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("shapes", [[(4, 16)], [(16, 4)], [(4, 16), (8, 32)]], ids=["fat", "tall", "two shapes"])
def test_operations_do_not_grow_with_the_number_of_gates(options, warm: bool, shapes) -> None:
    few, many = (count(SpectralRankPenalty(**options), gates(*(shapes * n)), warm=warm) for n in (2, 64))
    # the rest is autograd's: to hand the gradient of a stack to its parts it takes a view (select, unbind before) of each
    # and detaches it into .grad. No arithmetic, no copy.
    growth = {name: many[name] - few[name] for name in many | few if many[name] != few[name]}
    assert growth.keys() <= {"select", "unbind", "detach"}
    assert max(growth.values()) in (62 * len(shapes), 2 * 62 * len(shapes))  # torch 2.9 detaches twice


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("options", [{}, {"sigma_target": "initial", "relative": True}, {"center": True}])
def test_power_is_matmuls_without_host_synchronisation(options, warm: bool) -> None:
    seen = count(SpectralRankPenalty(**options, solver="power"), gates(*SHAPES), warm=warm)
    assert seen["bmm"] > 0
    assert not seen.keys() & (SYNCHRONISING | FACTORISING)
    # the same list does catch the exact solver
    assert count(SpectralRankPenalty(**options), gates(*SHAPES)).keys() & FACTORISING


@pytest.mark.parametrize("options", [{}, {"sigma_target": "initial", "relative": True}, {"center": True}])
def test_power_runs_on_tensors_without_data(options) -> None:
    with FakeTensorMode():
        penalty = SpectralRankPenalty(**options, solver="power")
        weights = gates(*SHAPES)
        for _ in range(3):
            penalty(weights).backward()
        assert [weight.grad.shape for weight in weights] == SHAPES
