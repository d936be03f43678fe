"""HypersphericalEnergyPenalty: projections, state, operations, messages."""

import copy
import itertools
import math

import moe_models
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_router import HypersphericalEnergyPenalty, wrap_moe
from spectral_router.functional import hyperspherical_energy
from spectral_router.penalties.energy_projections import angles_kept, project

RANDOM = {"projection": "random", "projection_dim": 6, "num_projections": 3}
LEARNED = [{"projection": "angle_preserving"}, {"projection": "adversarial"}]
KINDS = pytest.mark.parametrize("options", [RANDOM, *LEARNED, {"groups": 3}], ids=["random", "angles", "adversary", "groups"])


def test_penalty_is_the_sum_over_gates() -> None:
    weights = [torch.randn(shape) for shape in ((4, 16), (8, 3), (4, 16), (1, 7))]
    weights.append(torch.randn(4, 16, dtype=torch.float64))
    penalty = HypersphericalEnergyPenalty(1, half_space=True)
    parts = [hyperspherical_energy(weight, 1, half_space=True) for weight in weights]
    torch.testing.assert_close(penalty(weights), sum(parts))
    assert penalty(weights).dtype == torch.float64
    for part, expected in zip(penalty.each(weights), parts, strict=True):
        torch.testing.assert_close(part, expected)
    stacked = torch.randn(2, 3, 4, 9)
    for same in (stacked.flatten(0, 1).unbind(), iter(stacked.flatten(0, 1)), [stacked[0], stacked[1]]):
        torch.testing.assert_close(penalty(same), penalty(stacked))
    assert penalty.state_dict() == {}


@pytest.mark.parametrize("options", [{}, RANDOM, {**RANDOM, "shared_projection": False}, *LEARNED, {"groups": 2}])
def test_operations_do_not_grow_with_the_number_of_gates(options: dict[str, object]) -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = ("detach", "view", "unbind", "select", "alias", "slice")
            self.calls += func.overloadpacket.__name__.strip("_") not in views
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (2, 20):
        with Count() as count:
            HypersphericalEnergyPenalty(**options)([torch.zeros(4, 8).fill_(1.0)] * number)
        counts.append(count.calls)
    assert counts[0] == counts[1]


@KINDS
@pytest.mark.parametrize("shared", [True, False])
def test_reproducible_and_the_global_state_is_left_alone(options: dict[str, object], shared: bool) -> None:
    weights = [torch.randn(4, 16), torch.randn(8, 32), torch.randn(4, 16), torch.randn(3, 16)]
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5) if seed else None
        penalty = HypersphericalEnergyPenalty(seed=seed, shared_projection=shared, **options)
        state = torch.get_rng_state()
        runs.append([penalty(weights).item() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3  # each call another projection
    parts = [float(part) for part in penalty.eval().each(weights)]
    assert sum(parts) == pytest.approx(penalty(weights).item(), rel=1e-5)


@KINDS
def test_resumes_from_its_state(options: dict[str, object]) -> None:
    weights = [torch.randn(4, 16), torch.randn(8, 32)]
    penalty = HypersphericalEnergyPenalty(**options)
    for _ in range(3):
        penalty(weights)
    state = copy.deepcopy(penalty.state_dict())
    assert state["step"] == 3
    expected = [penalty(weights).item() for _ in range(2)]
    never_called, called = HypersphericalEnergyPenalty(**options), HypersphericalEnergyPenalty(**options)
    called(weights)
    for other in (never_called, called):
        other.load_state_dict(copy.deepcopy(state))
        assert [other(weights).item() for _ in range(2)] == expected
    parent = nn.ModuleDict({"penalty": HypersphericalEnergyPenalty(**options)})
    parent.load_state_dict({f"penalty.{name}": tensor for name, tensor in state.items()})
    assert parent["penalty"](weights).item() == expected[0]


@KINDS
def test_advances_in_training_only(options: dict[str, object]) -> None:
    weights = [torch.randn(4, 16)]
    penalty = HypersphericalEnergyPenalty(**options).eval()
    assert penalty(weights) == penalty(weights)
    penalty.train()
    with torch.no_grad():
        first = penalty(weights)
    with torch.inference_mode():
        assert penalty([weight.clone() for weight in weights]) == first
    assert penalty.state_dict().keys() == {"step"}
    assert penalty.step == 0
    before = [tensor.clone() for tensor in weights]
    assert penalty(weights) == first or options.get("projection") == "angle_preserving"
    assert penalty.step == 1
    assert all(map(torch.equal, weights, before))


def test_resample_every() -> None:
    weights, penalty = [torch.randn(4, 16)], HypersphericalEnergyPenalty(resample_every=3, **RANDOM)
    values = [penalty(weights).item() for _ in range(7)]
    assert values[0] == values[1] == values[2] != values[3] == values[4] == values[5] != values[6]


@pytest.mark.parametrize("options", [RANDOM, *LEARNED])
def test_gradient_takes_the_projection_as_constant(options: dict[str, object]) -> None:
    weight = torch.randn(2, 5, 16, requires_grad=True)
    penalty = HypersphericalEnergyPenalty(half_space=True, **options)
    seen = []
    original = penalty._projections
    penalty._projections = lambda *args: seen.append(original(*args)) or seen[-1]
    (ours,) = torch.autograd.grad(penalty(weight), weight)
    assert not seen[0].requires_grad
    energy = hyperspherical_energy(project(weight, seen[0]), half_space=True).mean(-1).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(energy, weight)[0])
    assert weight.grad is None


def drawn(penalty: HypersphericalEnergyPenalty, *batches: Tensor) -> Tensor:
    return penalty._projections(list(batches), 0)


def test_random_projections_are_normal_and_keep_angles_on_average() -> None:
    penalty = HypersphericalEnergyPenalty(projection="random", projection_dim=40, num_projections=500)
    weight = torch.randn(1, 6, 64)
    projections = drawn(penalty, weight)
    assert projections.shape == (500, 40, 64)
    flat, count = projections.flatten(), projections.numel()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((flat**power).mean() - expected) < 4 * math.sqrt(spread / count)
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / math.sqrt(count)
    penalty.step += 1
    assert abs((flat * drawn(penalty, weight).flatten()).mean()) < 4 / math.sqrt(count)
    angles = (torch.cosine_similarity(view[:, None], view[None], dim=-1) for view in (weight @ projections.mT))
    exact = torch.cosine_similarity(weight[0][:, None], weight[0][None], dim=-1)
    off = torch.stack(list(angles)) - exact
    assert off.mean(0).abs().max() < 0.03
    assert off.square().mean().sqrt() < 1 / math.sqrt(40)  # (1 - cos²) / sqrt(p) each


def test_shared_projections_are_one_for_each_width() -> None:
    twin, other = torch.randn(4, 16), torch.randn(4, 16)
    for shared in (True, False):
        penalty = HypersphericalEnergyPenalty(shared_projection=shared, **RANDOM)
        first, second, _ = penalty.each([twin, twin, other])
        assert (first == second) == shared
    assert drawn(penalty, torch.stack([twin, twin])).shape == (2, 3, 6, 16)


@pytest.mark.parametrize(
    ("shape", "share"), [((4, 16), 0.1), ((8, 64), 0.1), ((16, 1024), 0.5), ((32, 64), 0.6), ((96, 48), 0.7)]
)
def test_angle_preserving_projections_improve(shape: tuple[int, int], share: float) -> None:
    weight = torch.randn(2, *shape)
    for shared in (True, False):
        penalty = HypersphericalEnergyPenalty(projection="angle_preserving", projection_dim=12, shared_projection=shared)
        errors = [-angles_kept(weight, drawn(penalty.eval(), weight)).mean().item()]
        for _ in range(20):
            penalty.train()(weight)
            errors.append(-angles_kept(weight, penalty.projection_0).mean().item())
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < share * errors[0]


@pytest.mark.parametrize("projection_lr", [0.001, 1.0, 100.0])
@pytest.mark.parametrize("shared", [True, False])
def test_the_adversary_raises_the_energy(projection_lr: float, shared: bool) -> None:
    weight = torch.randn(3, 6, 24)
    options = {"projection_dim": 10, "num_projections": 2, "shared_projection": shared}
    start = HypersphericalEnergyPenalty(projection="random", **options)(weight)
    raised = HypersphericalEnergyPenalty(projection="adversarial", projection_lr=projection_lr, **options)(weight)
    assert raised >= start
    assert raised > start or projection_lr == 100


def test_groups_share_out_the_dimensions() -> None:
    weight = torch.randn(1, 4, 11)
    penalty = HypersphericalEnergyPenalty(groups=3)
    parts = penalty._split(weight, 3)
    assert parts.shape == (1, 3, 4, 3)
    columns = [tuple(column) for part in parts[0] for column in part.T.tolist()]
    assert len(set(columns)) == 9 <= len(set(columns) | {tuple(column) for column in weight[0].T.tolist()}) == 11
    torch.testing.assert_close(penalty(weight), hyperspherical_energy(parts).mean())


def test_moves_with_the_module_and_survives_half() -> None:
    penalty, weight = HypersphericalEnergyPenalty(projection="angle_preserving"), torch.randn(4, 16)
    penalty(weight)
    twin = copy.deepcopy(penalty).half()
    assert twin.step == 1
    torch.testing.assert_close(twin(weight), penalty(weight), rtol=1e-2, atol=1e-2)
    assert penalty.to("meta").step.device.type == penalty.projection_0.device.type == "meta"


def test_plugs_into_wrap_moe() -> None:
    for options in ({}, RANDOM, *LEARNED, {"groups": 2}):
        torch.manual_seed(0)
        model = moe_models.Regressor()
        penalty = HypersphericalEnergyPenalty(**options)
        x, target = moe_models.tokens(), torch.randn(3, 5, moe_models.DIM)
        with wrap_moe(model, penalty=penalty, balance=None, penalty_coef=0.5) as handle:
            with_term = model(x, target)["loss"]
            with_term.backward()
            rows = handle.metrics().values()
            state = handle.state_dict()
            following = model(x, target)["loss"]
        assert all(layer.gate.weight.grad.isfinite().all() for layer in model.layers)
        assert with_term > model(x, target)["loss"]
        assert all(row["penalty"] > 0 for row in rows)
        with wrap_moe(model, penalty=HypersphericalEnergyPenalty(**options), balance=None, penalty_coef=0.5) as resumed:
            resumed.load_state_dict(state)
            assert model(x, target)["loss"] == following


@pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"angular": True, "half_space": True}, RANDOM, {"groups": 2}])
def test_compiles_without_a_graph_break(options: dict[str, object]) -> None:
    torch.compiler.reset()
    penalty, quick = (HypersphericalEnergyPenalty(**options) for _ in range(2))
    fast = torch.compile(quick, fullgraph=True, backend="aot_eager")
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4, 16), (8, 5), (4, 16))]
    for _ in range(3):
        expected, value = penalty(weights), fast(weights)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, weights), torch.autograd.grad(expected, weights))
    assert not options.get("projection") or quick.step == 3
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------------- messages


def test_message_weights() -> None:
    penalty = HypersphericalEnergyPenalty()
    with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
        penalty([])
    with pytest.raises(ValueError, match=r"weights must be matrices \(experts, dim\), got shape \(4,\) at position 1"):
        penalty([torch.eye(3), torch.ones(4)])
    with pytest.raises(TypeError, match="weights must be tensors, got list at position 0"):
        penalty([[1.0]])
    for function in (penalty, hyperspherical_energy):
        with pytest.raises(TypeError, match=r"weight must be floating point, got torch\.int64"):
            function(torch.ones(3, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"weight must hold matrices, .* got shape \(0, 4\)"):
            function(torch.ones(0, 4))


@pytest.mark.parametrize(
    "function", [HypersphericalEnergyPenalty, lambda *a, **o: hyperspherical_energy(torch.eye(3), *a, **o)]
)
def test_message_energy(function) -> None:
    with pytest.raises(ValueError, match=r"s must be 0, 1 or 2, the power of 1/r \(0: its logarithm\), got s=3"):
        function(3)
    for eps in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"eps must be above 0 and at most 1, as it is a floor .*, got eps={eps}"):
            function(eps=eps)


def test_message_constructor() -> None:
    with pytest.raises(ValueError, match=r"""projection must be None, "random", .* or "adversarial", got projection='pca'"""):
        HypersphericalEnergyPenalty(projection="pca")
    for name in ("projection_dim", "num_projections", "resample_every", "projection_steps", "groups"):
        for value in (0, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {name}={value}"):
                HypersphericalEnergyPenalty(**{name: value})
    for value in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"projection_lr must be a finite number above 0, got projection_lr={value}"):
            HypersphericalEnergyPenalty(projection_lr=value)
    for value in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match=rf"seed must be a whole number from 0 to 2\*\*32 - 1, got seed={value}"):
            HypersphericalEnergyPenalty(seed=value)
    message = "groups takes the place of a projection, got groups=2, projection='random'; set one of them to None"
    with pytest.raises(ValueError, match=message):
        HypersphericalEnergyPenalty(projection="random", groups=2)


def test_message_at_the_call() -> None:
    with pytest.raises(ValueError, match="groups must be at most dim, the number of columns, got groups=4, dim=3"):
        HypersphericalEnergyPenalty(groups=4)(torch.eye(3))
    penalty = HypersphericalEnergyPenalty(projection="angle_preserving")
    penalty(torch.eye(3, 8))
    message = (
        r'with projection="angle_preserving" every call must bring the matrices of the first call, whose projection_0 has '
        r"shape \(1, 8, 8\), got matrices that need \(1, 9, 9\); use one penalty for each model"
    )
    with pytest.raises(ValueError, match=message):
        penalty(torch.eye(3, 9))
    assert penalty(torch.eye(3, 8)).isfinite()  # and the module still works


@pytest.mark.parametrize("options", [{}, RANDOM, *LEARNED, {"groups": 2, "resample_every": 5, "seed": 7}])
def test_repr_is_the_call_that_makes_it(options: dict[str, object]) -> None:
    penalty = HypersphericalEnergyPenalty(1, angular=True, **options)
    assert repr(eval(repr(penalty))) == repr(penalty)
