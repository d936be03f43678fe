"""SpectralNormPenalty: what it keeps between calls, its operations and its messages."""

import copy
import math
import pickle
import re

import pytest
import reference
import torch
from moe_models import DIM, Block, Stack, tokens
from norm_matrices import dominated, gradients, iterates, layers
from operations import FACTORISING, SYNCHRONISING, count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_router import SpectralNormPenalty, wrap_moe

SHAPES = [(4, 16), (8, 3), (4, 16), (2, 2), (1, 7), (8, 3, 3, 3), (5, 1), (6, 4, 5)]
SOLVERS = pytest.mark.parametrize("solver", ["iteration", "exact"])


def test_iterates_advance_in_training_with_gradients_only() -> None:
    weights = layers(*SHAPES)
    penalty = SpectralNormPenalty()
    for quiet in (torch.no_grad, torch.inference_mode):  # before training nothing is kept
        with quiet():
            cold = penalty(weights).item()
    assert penalty.eval()(weights).item() == cold
    assert not iterates(penalty)
    assert penalty.train()(weights).item() == cold
    before = iterates(penalty)
    assert len(before) == len(set(SHAPES))
    for training, quiet in ((True, torch.no_grad), (True, torch.inference_mode), (False, torch.enable_grad)):
        penalty.train(training)
        with quiet():
            warm = [penalty(weights).item() for _ in range(2)]
        assert warm[0] == warm[1] >= cold * (1 - 1e-6)
        torch.testing.assert_close(iterates(penalty), before, rtol=0, atol=0)
    penalty.train()(weights).backward()
    assert not all(torch.equal(iterates(penalty)[name], before[name]) for name in before)


def test_iterates_are_copied_and_pickled_and_stay_out_of_state_dict() -> None:
    weights = layers(*SHAPES)
    penalty = SpectralNormPenalty(1, power=2)
    for _ in range(3):
        penalty(weights).backward()
    assert penalty.state_dict() == {}
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        torch.testing.assert_close(iterates(twin), iterates(penalty), rtol=0, atol=0)
        torch.testing.assert_close(twin(weights), penalty.eval()(weights), rtol=0, atol=0)
        with pytest.raises(ValueError, match="every call must bring the matrices of the first call"):
            twin(weights[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_iterates_keep_their_precision_and_move(dtype: torch.dtype) -> None:
    weights = layers((4, 8), (4, 8))
    penalty = SpectralNormPenalty()
    penalty(weights)
    model = nn.ModuleDict({"penalty": penalty, "layer": nn.Linear(2, 2)})
    before = iterates(penalty)
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert model["layer"].weight.dtype == dtype
    torch.testing.assert_close(iterates(penalty), before, rtol=0, atol=0)
    assert penalty([weight.to(dtype) for weight in weights]).isfinite()
    assert model.to("meta")["penalty"].iterate_0.is_meta


def test_backward_after_the_weights_and_iterates_have_changed() -> None:
    # sharded training frees a weight before backward; the next forward of an accumulated step moves the iterate
    weights = dominated((4, 8), (4, 8))
    expected = gradients(SpectralNormPenalty(), weights)
    penalty = SpectralNormPenalty()
    value = penalty(weights)
    penalty(weights)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    torch.testing.assert_close(list(torch.autograd.grad(value, weights)), expected)


def test_nothing_of_the_size_of_the_weights_is_kept_for_backward() -> None:
    weights = layers(*[(16, 64)] * 8)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        SpectralNormPenalty()(weights).backward()
    assert max(saved) <= 8 * 64 * 4


# ------------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_iteration_is_matmuls_without_host_synchronisation(warm: bool) -> None:
    seen = count(SpectralNormPenalty(1, power=2), layers(*SHAPES), warm=warm)
    # two products a group and iteration, and one in backward
    assert seen["bmm"] == len(set(SHAPES)) * ((2 if warm else 30) + 1)
    assert not seen.keys() & (SYNCHRONISING | FACTORISING)
    assert count(SpectralNormPenalty(solver="exact"), layers(*SHAPES), warm=warm).keys() & FACTORISING


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_operations_do_not_grow_with_the_number_of_layers(warm: bool) -> None:
    few, many = (count(SpectralNormPenalty(), layers(*[(4, 16)] * n), warm=warm) for n in (2, 64))
    assert {name for name in many | few if many[name] != few[name]} <= {"select", "unbind", "detach"}


def test_iteration_runs_on_tensors_without_data() -> None:
    with FakeTensorMode():
        penalty, weights = SpectralNormPenalty(), layers(*SHAPES)
        for _ in range(3):
            penalty(weights).backward()
        assert [weight.grad.shape for weight in weights] == SHAPES


@pytest.mark.filterwarnings(
    r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch",
    r"ignore:.*should not be instantiated:DeprecationWarning",
)
@SOLVERS
def test_compiled_without_a_graph_break(solver: str) -> None:
    torch.compiler.reset()
    penalty = SpectralNormPenalty(1, power=2, solver=solver)
    fast = torch.compile(copy.deepcopy(penalty), fullgraph=True, backend="aot_eager")
    weights = dominated((4, 16), (4, 2, 3), (4, 16))
    # the first call makes the state, the second finds it there, the third sees what the second stored
    for _ in range(3):
        value, expected = fast(weights), penalty(weights)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        of_fast, of_slow = torch.autograd.grad(value, weights), torch.autograd.grad(expected, weights)
        torch.testing.assert_close(of_fast, of_slow, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for weight in weights:
                weight += 0.1 * torch.randn_like(weight)
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("others", [[(4, 8)], [(4, 9)], [(4, 8), (4, 8), (4, 8)], [(4, 8), (2, 8)]])
def test_message_other_matrices(others: list[tuple[int, int]]) -> None:
    penalty = SpectralNormPenalty()
    penalty(layers((4, 8), (4, 8)))
    message = (
        r'with solver="iteration" every call must bring the matrices of the first call, shapes \[\(2, 4, 8\)\], got \[.*\]; '
        "use one SpectralNormPenalty for each model"
    )
    with pytest.raises(ValueError, match=message):
        penalty(layers(*others))
    penalty(layers((4, 8), (4, 8)))  # and the module still works
    unused = SpectralNormPenalty()
    with torch.no_grad():  # a call that stores nothing binds to nothing
        unused(layers(*others))
    unused(layers((4, 8), (4, 8)))
    SpectralNormPenalty(solver="exact")(layers(*others))


def test_message_weights() -> None:
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
            SpectralNormPenalty()(empty)
    with pytest.raises(ValueError, match=r"weights must be matrices .*, got shape \(4,\) at position 1"):
        SpectralNormPenalty()([torch.eye(3), torch.ones(4)])
    with pytest.raises(ValueError, match=r"weight must hold matrices, .* got shape \(3, 0\)"):
        SpectralNormPenalty()([torch.ones(3, 0, 2)])
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
        SpectralNormPenalty()([torch.ones(3, 4, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"weights must be tensors, got Linear at position 0; pass module\.weight"):
        SpectralNormPenalty()([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sigma_target": -1}, ValueError, "sigma_target must be a finite number of at least 0, got sigma_target=-1"),
        ({"sigma_target": math.nan}, ValueError, "sigma_target must be a finite number of at least 0"),
        ({"sigma_target": "initial"}, TypeError, "sigma_target must be a number, got sigma_target='initial'"),
        ({"power": 0.5}, ValueError, "power must be a finite number of at least 1, got power=0.5"),
        ({"power": math.inf}, ValueError, "power must be a finite number of at least 1, got power=inf"),
        ({"power": "2"}, TypeError, "power must be a number, got power='2'"),
        ({"solver": "power"}, ValueError, """solver must be "iteration" or "exact", got solver='power'"""),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got iterations=0"),
        ({"iterations": 1.5}, TypeError, "iterations must be a whole number, got iterations=1.5"),
    ],
)
def test_message_constructor(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        SpectralNormPenalty(**options)


def test_repr_is_the_call_that_makes_it() -> None:
    penalty = SpectralNormPenalty(1, power=2, solver="exact", iterations=3)
    assert repr(eval(repr(penalty))) == repr(penalty)


# -------------------------------------------------------------------------------------------------------------- wrap_moe


@pytest.mark.filterwarnings("ignore:frozen gates are left alone")
def test_plugs_into_wrap_moe() -> None:
    model = Stack(Block(), Block())
    model.layers[1].gate.weight.requires_grad_(False)  # left out of the term, while the penalty sees both
    handle = wrap_moe(model, penalty=SpectralNormPenalty(), penalty_coef=0.5, balance=None)
    before = handle.metrics()
    for _ in range(2):
        model(tokens()).sum()
        term = handle.loss()
        assert term.item() == pytest.approx(
            0.5 * reference.spectral_norm_penalty([model.layers[0].gate.weight]).item(), rel=0.02
        )
        (gradient,) = torch.autograd.grad(term, model.layers[0].gate.weight)
        assert gradient.shape == (4, DIM)
    after = handle.metrics()
    for name in before:
        assert after[name]["penalty"] == pytest.approx(before[name]["penalty"], rel=0.02)
    assert list(handle.state_dict()["penalty"]) == ["iterate_0"]
    fresh = wrap_moe(Stack(Block(), Block()), penalty=SpectralNormPenalty(), balance=None)
    fresh.load_state_dict(handle.state_dict())
    torch.testing.assert_close(iterates(fresh.penalty), iterates(handle.penalty), rtol=0, atol=0)
    assert fresh.penalty.state_dict() == {}
