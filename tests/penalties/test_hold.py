"""SpectralRankPenalty that holds matrices where they are: anchors of the stable rank, one-sided deviations, drift."""

import copy
import io
import math
import pickle

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from operations import FACTORISING, SYNCHRONISING, Operations, count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_router import SpectralRankPenalty
from spectral_router.functional import spectral_norm, spectral_rank_penalty, stable_rank
from spectral_router.penalties.presets import preset

HOLD = {"sigma_target": "initial", "rank_target": "initial", "relative": True, "one_sided": True}
SOLVERS = pytest.mark.parametrize("solver", ["auto", "exact", "power"])


def spiked(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Singular values 1, 1/2, 1/3 ... to some scale, so that gradients are unique."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (rows, columns))
    least = min(rows, columns)
    return left[:, :least] / torch.arange(1, least + 1) @ right[:least]


def trained_like(rank: float = 6.8, experts: int = 64, dim: int = 256) -> Tensor:
    """A gate with this stable rank: one singular value above equal ones."""
    left = torch.linalg.qr(torch.randn(experts, experts))[0]
    right = torch.linalg.qr(torch.randn(dim, experts))[0].mT
    values = torch.full((experts,), ((rank - 1) / (experts - 1)) ** 0.5)
    values[0] = 1.0
    return 3.0 * left * values @ right


# ------------------------------------------------------------------------------------------- against the literal formulas


@given(
    shapes=st.lists(st.tuples(st.integers(2, 6), st.integers(2, 9)), min_size=1, max_size=4),
    factors=st.lists(st.sampled_from([0.5, 0.9, 1.1, 2.0]), min_size=5, max_size=5),
    mix=st.lists(st.sampled_from([-0.4, -0.1, 0.2, 0.5]), min_size=5, max_size=5),
    targets=st.sampled_from([("initial", "initial"), (0.7, "initial"), ("initial", 1.0), ("initial", None), (0.7, None)]),
    relative=st.booleans(),
    center=st.booleans(),
    one_sided=st.booleans(),
    solver=st.sampled_from(["auto", "exact", "power"]),
)
def test_values_and_gradients_are_the_literal_ones(
    shapes, factors, mix, targets, relative: bool, center: bool, one_sided: bool, solver: str
) -> None:
    shapes = [*shapes, shapes[0]]  # at least one shape twice
    starts = [spiked(*shape, seed) for seed, shape in enumerate(shapes)]
    # norms go up and down, and ranks: the powers of the Gram matrix spread the singular values or draw them together
    moved = [factor * (start + by * start @ start.mT @ start) for start, factor, by in zip(starts, factors, mix, strict=False)]
    penalty = SpectralRankPenalty(*targets, relative=relative, center=center, one_sided=one_sided, solver=solver)
    penalty(starts)
    leaves = [weight.clone().requires_grad_() for weight in moved]
    value = penalty(leaves)

    def literal(weight: Tensor, start: Tensor) -> Tensor:
        seen = start - start.mean(0) if center else start
        goals = (reference.spectral_norm(seen), reference.stable_rank(seen))
        told = [goal if target == "initial" else target for goal, target in zip(goals, targets, strict=True)]
        return reference.spectral_rank_penalty(weight, *told, relative, center, one_sided)

    pairs = list(zip(moved, starts, strict=True))
    torch.testing.assert_close(value, sum(literal(*pair) for pair in pairs), rtol=1e-6, atol=1e-8)
    expected = [reference.gradient(lambda w, start=start: literal(w, start), weight) for weight, start in pairs]
    torch.testing.assert_close(torch.autograd.grad(value, leaves), tuple(expected), rtol=1e-4, atol=1e-6)


@given(relative=st.booleans(), seed=st.integers(0, 20))
def test_the_function_takes_a_target_for_each_matrix_and_one_side(relative: bool, seed: int) -> None:
    weights = torch.stack([spiked(4, 7, seed), 2 * spiked(4, 7, seed + 1)])
    norms, ranks = torch.tensor([0.8, 2.5]).double(), torch.tensor([1.2, 1.6]).double()
    for one_sided in (False, True):
        leaf = weights.clone().requires_grad_()
        value = spectral_rank_penalty(leaf, norms, ranks, relative=relative, one_sided=one_sided)
        expected = reference.spectral_rank_penalty(weights, norms, ranks, relative, one_sided=one_sided)
        torch.testing.assert_close(value, expected)
        slope = reference.gradient(
            lambda w, side=one_sided: reference.spectral_rank_penalty(w, norms, ranks, relative, one_sided=side), weights
        )
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], slope)


def test_message_of_the_function() -> None:
    with pytest.raises(TypeError, match="rank_target must be a number, a tensor or None, got rank_target='initial'"):
        spectral_rank_penalty(torch.eye(3), 1.0, "initial")


# ------------------------------------------------------------------------------------------------------ trained gates


@SOLVERS
def test_a_trained_gate_has_no_gradient_at_the_start(solver: str) -> None:
    gate = nn.Parameter(trained_like())
    assert stable_rank(gate).item() == pytest.approx(6.8, abs=0.01)
    penalty = SpectralRankPenalty(**HOLD, solver=solver)
    value = penalty([gate])
    value.backward()
    assert value.item() == 0
    assert gate.grad.count_nonzero() == 0
    # which "spread" has: that is what is new
    assert torch.autograd.grad(preset("spread")([gate]), gate)[0].norm() > 1e-3


def test_only_a_lower_rank_and_a_higher_norm_cost_anything() -> None:
    start = trained_like()
    penalty = preset("hold")
    penalty([start])
    norm, rank = spectral_norm(start), stable_rank(start)
    flatter = start + 0.5 * (torch.linalg.qr(start.mT)[0].mT - start / norm)
    flatter = flatter / spectral_norm(flatter) * norm
    assert stable_rank(flatter) > rank
    assert penalty([0.5 * start]).item() == 0
    assert penalty([0.99 * flatter]).item() == 0
    assert penalty([1.5 * start]).item() == pytest.approx(0.25, rel=1e-4)
    collapsed = trained_like(3.4)
    assert penalty([collapsed * norm / spectral_norm(collapsed)]).item() == pytest.approx(0.25, rel=1e-2)


def test_training_brings_a_gate_back_to_its_rank_and_not_above() -> None:
    start = trained_like(6.8, 16, 64)
    penalty = preset("hold")
    penalty([start])
    norm = spectral_norm(start).item()
    gate = nn.Parameter(trained_like(3.4, 16, 64) * 1.2)
    assert stable_rank(gate).item() < 3.5
    optimizer = torch.optim.Adam([gate], lr=1e-3, betas=(0.0, 0.99))  # without momentum, which would carry it past
    for _ in range(800):
        optimizer.zero_grad()
        penalty([gate]).backward()
        optimizer.step()
    assert stable_rank(gate).item() == pytest.approx(6.8, abs=0.1)
    assert spectral_norm(gate).item() <= 1.01 * norm


# ------------------------------------------------------------------------------------------------------------- anchors


@SOLVERS
@pytest.mark.parametrize("center", [False, True])
def test_each_matrix_is_held_at_its_own_rank(solver: str, center: bool) -> None:
    weights = [spiked(4, 9, 1).float(), spiked(8, 3, 2).float(), 5 * spiked(4, 9, 3).float()]
    penalty = SpectralRankPenalty(rank_target="initial", center=center, solver=solver)
    penalty(weights)
    ranks = [stable_rank(weight - weight.mean(0) if center else weight) for weight in (weights[0], weights[2], weights[1])]
    torch.testing.assert_close(penalty.rank_anchor, torch.stack(ranks), rtol=1e-4, atol=1e-4)
    before = penalty.rank_anchor.clone()
    penalty([torch.randn_like(weight) for weight in weights])
    assert torch.equal(penalty.rank_anchor, before)  # first seen, not last seen
    assert penalty.anchor is None
    assert not penalty.rank_anchor.requires_grad


@SOLVERS
def test_the_anchor_of_a_zero_matrix_is_the_least_rank_and_not_a_number_waits(solver: str) -> None:
    penalty = SpectralRankPenalty(**HOLD, solver=solver)
    assert penalty([torch.zeros(3, 5), torch.full((3, 5), math.nan)]).isnan()
    assert penalty([torch.eye(3, 5), 2 * torch.eye(3, 5)]).item() == pytest.approx(0, abs=1e-6)
    assert penalty.rank_anchor.tolist() == pytest.approx([1, 3])
    assert penalty.anchor.tolist() == pytest.approx([1, 2])


def test_anchors_are_float64_if_a_gate_is() -> None:
    penalty = SpectralRankPenalty(rank_target="initial")
    penalty([torch.eye(3), spiked(3, 3)])
    exact = (1 + 1 / 4 + 1 / 9, 3.0)
    assert sorted(penalty.rank_anchor.tolist()) == pytest.approx(sorted(exact), rel=1e-14)


def test_state_dict_carries_both_anchors() -> None:
    weights = [spiked(4, 9, 1).float(), spiked(8, 3, 2).float()]
    trained = preset("hold")
    trained(weights)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == ["anchor", "rank_anchor"]
    moved = [1.5 * weight for weight in weights]
    never_called, called = preset("hold"), preset("hold")
    called(moved)
    for penalty in (never_called, called, copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        penalty.load_state_dict(state)
        torch.testing.assert_close(penalty(moved), trained(moved))
    assert trained(moved) > 0


def test_half_precision_leaves_the_anchors() -> None:
    penalty = preset("hold")
    penalty([spiked(4, 9).float()])
    before = penalty.rank_anchor.clone()
    assert torch.equal(penalty.half().rank_anchor, before)


def test_a_first_call_in_inference_mode_keeps_nothing() -> None:
    weights, penalty = [nn.Parameter(spiked(4, 9).float())], preset("hold")
    with torch.inference_mode():
        assert penalty(weights).item() == 0
    assert not dict(penalty.named_buffers())
    penalty([1.5 * weights[0]]).backward()
    assert penalty.anchor.item() == pytest.approx(1.5)


def test_messages_of_other_matrices_and_other_anchors() -> None:
    penalty = SpectralRankPenalty(rank_target="initial")
    penalty([torch.randn(4, 9)])
    with pytest.raises(ValueError, match='with a target "initial" or solver="power" every call must bring the matrices'):
        penalty([torch.randn(5, 9)])
    loaded = SpectralRankPenalty(rank_target="initial")
    loaded.load_state_dict({"rank_anchor": torch.ones(3)})
    with pytest.raises(ValueError, match="the loaded state holds anchors of 3 matrices, got 1 matrices"):
        loaded([torch.randn(4, 9)])


def test_drift_is_against_the_anchors() -> None:
    weights = [spiked(4, 9, 1).float(), spiked(8, 3, 2).float(), spiked(4, 9, 3).float()]
    penalty = preset("hold")
    penalty(weights)
    moved = [factor * weight for factor, weight in zip((0.5, 1.0, 3.0), weights, strict=True)]
    moved[1] = trained_like(1.3, 3, 8).mT
    norms, ranks = penalty.drift(moved)
    norm, rank = (float(function(moved[1]) / function(weights[1]) - 1) for function in (spectral_norm, stable_rank))
    assert [value.item() for value in norms] == pytest.approx([-0.5, norm, 2.0], rel=1e-4)
    assert [value.item() for value in ranks] == pytest.approx([0, rank, 0], rel=1e-4, abs=1e-5)
    assert rank < -0.01
    norms, ranks = SpectralRankPenalty("initial").drift(weights)  # nothing seen yet, and no anchor of the rank at all
    assert all(value.isnan() for value in (*norms, *ranks))


# ---------------------------------------------------------------------------------------------------------- operations


def test_operations_do_not_grow_with_the_number_of_gates() -> None:
    few, many = (count(preset("hold"), [nn.Parameter(torch.randn(4, 16)) for _ in range(n)]) for n in (2, 64))
    grown = {name for name in many if many[name] != few[name]}
    assert grown <= {"select", "unbind", "detach"}


def test_a_gpu_gets_matrix_products_without_host_synchronisation() -> None:
    # tensors that say they are on a GPU and hold nothing; autograd would ask for a driver
    with FakeTensorMode(), torch.no_grad():
        penalty = preset("hold")
        for _ in range(2):
            with Operations() as operations:
                value = penalty([torch.empty(4, 16, device="cuda"), torch.empty(8, 3, device="cuda")])
            assert value.device.type == "cuda"
            assert operations.count["bmm"] > 0
            assert not operations.count.keys() & (SYNCHRONISING | FACTORISING)
    # the same list does catch the exact solver, which is what a CPU has
    assert count(preset("hold"), [nn.Parameter(torch.randn(4, 16))]).keys() & FACTORISING


# ---------------------------------------------------------------------------------------------------- the solver "auto"


def test_auto_is_exact_on_a_cpu_and_matrix_products_where_it_is_compiled() -> None:
    torch.compiler.reset()
    weights = [nn.Parameter(spiked(4, 9, 1).float()), nn.Parameter(spiked(8, 16, 2).float())]
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]):
        def lowered(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        return torch._dynamo.backends.common.aot_autograd(fw_compiler=lowered)(module, inputs)

    def graph_of(solver: str) -> set[str]:
        seen.clear()
        penalty = SpectralRankPenalty(relative=True, solver=solver)
        value = torch.compile(lambda *w: penalty(w), backend=backend, fullgraph=True)(*weights)
        torch.testing.assert_close(value, SpectralRankPenalty(relative=True, solver="exact")(weights), rtol=1e-4, atol=1e-5)
        return {name.split(".")[1] for name in seen if "." in name}

    assert not graph_of("auto") & FACTORISING
    assert graph_of("exact") & FACTORISING
    torch.compiler.reset()


def test_auto_without_a_target_to_remember_serves_any_matrices_on_any_device() -> None:
    penalty = SpectralRankPenalty()
    assert not penalty.remembers
    with FakeTensorMode(), torch.no_grad():
        for device in ("cpu", "cuda"):
            for shape in ((4, 16), (8, 3)):
                penalty([torch.empty(shape, device=device)])
    assert not dict(penalty.named_buffers())


def test_training_without_a_kept_start_follows_the_exact_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # what "auto" does on a GPU, made to do so here; both paths are judged by the exact penalty
    judge, paths = SpectralRankPenalty(relative=True, solver="exact"), []
    for solver in ("exact", "auto"):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(64, 512) / 512**0.5)]
        penalty = SpectralRankPenalty(relative=True, solver=solver)
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        path = []
        for _ in range(200):
            path.append(judge(weights).item())
            optimizer.zero_grad()
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                value = penalty(weights)
            value.backward()
            optimizer.step()
        paths.append(path)
    exact, auto = paths
    assert exact[-1] < 0.01 * exact[0]  # far enough to tell
    assert auto == pytest.approx(exact, rel=0.02)
    assert auto != exact
