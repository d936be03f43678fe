"""ImportanceConstraint and LossFreeBias: what they do, against loops over tokens and experts."""

import itertools
import math
import re

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from spectral_router.balance.controllers import ImportanceConstraint, LossFreeBias
from spectral_router.routing.route import route

CASES = {
    "num_experts": st.integers(1, 6),
    "keep": st.sampled_from([None, 1, 2, 6]),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    "scale": st.sampled_from([0.25, 1.0, 64.0]),
    "skew": st.sampled_from([0.0, 1.0, 4.0]),
    "seed": st.integers(0, 999),
}


def steps_of(num_experts: int, dtype: torch.dtype, scale: float, skew: float, seed: int, number: int = 25) -> list[Tensor]:
    """Logits of some steps, each of another shape, now and then empty; distinct in each row, in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes, steps = [(5,), (2, 3), (), (0,), (1,), (4, 0), (9,)], []
    for step in range(number):
        logits = torch.randn(*shapes[(seed + step) % len(shapes)], num_experts, generator=generator)
        rank = (logits + skew * torch.arange(num_experts)).argsort(-1).argsort(-1)
        steps.append((scale * (rank + 0.4 * torch.rand(rank.shape, generator=generator))).to(dtype))
    return steps


def dense(weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(*weights.shape[:-1], num_experts).scatter(-1, indices, weights.float()).reshape(-1, num_experts)


def table(rows: list[list[float]], num_experts: int) -> Tensor:
    return torch.tensor(rows).reshape(-1, num_experts)


@given(
    bound=st.sampled_from([0.0503, 0.3101, 0.5077, 1.7139]),
    rule=st.sampled_from([("relative", None), ("mean", None), ("mean", 0.1), ("mean", 1.0)]),
    **CASES,
)
def test_constraint_against_the_loop(bound, rule, num_experts, keep, dtype, scale, skew, seed) -> None:
    kind, momentum = rule
    top_k = keep and min(keep, num_experts)
    steps = steps_of(num_experts, dtype, scale, skew, seed)
    flat = [logits.reshape(-1, num_experts) for logits in steps]
    constraint = ImportanceConstraint(num_experts, bound, kind=kind, momentum=momentum)
    found = reference.importance_constraint(flat, top_k, bound, kind, momentum)
    compared = 0
    for logits, (opened, rows, state, margin) in zip(steps, found, strict=True):
        if margin < 1e-3:
            break  # too near for float32 to say
        compared += 1
        assert constraint.open.tolist() == opened
        output = route(logits, top_k, controller=constraint, dtype=torch.float32)
        weights = dense(output.weights, output.indices, num_experts)
        torch.testing.assert_close(weights, table(rows, num_experts), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(constraint.importance, torch.tensor(state), rtol=1e-4, atol=2e-4)
    assume(compared > 10)


@given(rate=st.sampled_from([0.0137, 0.313, 2.07]), **CASES)
def test_bias_against_the_loop(rate, num_experts, keep, dtype, scale, skew, seed) -> None:
    top_k = keep and min(keep, num_experts)
    steps = steps_of(num_experts, dtype, scale, skew, seed)
    bias = LossFreeBias(num_experts, rate)
    found = reference.loss_free_bias([logits.reshape(-1, num_experts) for logits in steps], top_k, rate)
    for logits, (rows, state) in zip(steps, found, strict=True):
        output = route(logits, top_k, controller=bias, dtype=torch.float32)
        weights = dense(output.weights, output.indices, num_experts)
        torch.testing.assert_close(weights, table(rows, num_experts), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias.bias, torch.tensor(state), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ constraint


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_no_expert_passes_its_bound_by_more_than_a_step(bound: float, top_k: int | None) -> None:
    constraint, skew = ImportanceConstraint(8, bound), torch.linspace(0, 6, 8)
    closed, largest = 0, 0.0
    for _ in range(1000):
        before, opened = constraint.importance.clone(), constraint.open
        route(torch.randn(16, 8) + skew, top_k, controller=constraint)
        step = constraint.importance - before
        assert step.max() <= 7 + 1e-3
        assert (constraint.importance <= bound + step + 1e-3)[opened].all()
        torch.testing.assert_close(step[~opened], torch.full((int((~opened).sum()),), -1.0), rtol=0, atol=1e-3)
        closed += int((~opened).any())
        largest = max(largest, step.max().item())
        assert constraint.importance.max() <= bound + largest + 1e-3
    assert closed > 100
    assert constraint.importance.sum().abs() < 0.01
    free = ImportanceConstraint(8, 1e9)  # which is far from what happens without a bound
    for _ in range(100):
        route(torch.randn(16, 8) + skew, top_k, controller=free)
    assert free.importance.max() > 30


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("momentum", [None, 0.05])
def test_the_mean_passes_its_bound_by_no_more_than_a_step(bound: float, momentum: float | None) -> None:
    constraint = ImportanceConstraint(8, bound, kind="mean", momentum=momentum)
    for step in range(1, 500):
        route(torch.randn(16, 8) + torch.linspace(0, 6, 8), 1, controller=constraint)
        assert constraint.importance.max() - 1 / 8 <= bound + max(1 / step, momentum or 0) + 1e-5
        torch.testing.assert_close(constraint.importance.sum(), torch.tensor(1.0))
    assert constraint.importance[-1] == pytest.approx(1 / 8 + bound, abs=max(1 / step, momentum or 0))


def test_momentum_forgets() -> None:
    states = []
    for momentum in (None, 0.2):
        constraint = ImportanceConstraint(2, 1.0, kind="mean", momentum=momentum)
        for expert in [0] * 50 + [1] * 50:
            route(torch.eye(2)[[expert]], 1, controller=constraint)
        states.append(constraint.importance)
    torch.testing.assert_close(states[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(states[1], torch.tensor([0.8**50, 1 - 0.8**50]))


def test_one_expert_is_always_open_also_under_rounding() -> None:
    constraint = ImportanceConstraint(4, 0.1)
    constraint.importance.copy_(torch.tensor([0.4, 0.3, 0.2, 0.9]))  # no sequence of exact steps leads here
    assert constraint.open.tolist() == [False, False, True, False]
    assert route(torch.randn(3, 4), controller=constraint).indices.shape == (3, 4)
    mean = ImportanceConstraint(4, 0.0, kind="mean")
    mean.importance.fill_(0.26)
    assert mean.open.all()


@pytest.mark.parametrize("kind", ["relative", "mean"])
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_single_expert(kind: str, top_k: int | None) -> None:
    constraint = ImportanceConstraint(1, 0.0, kind=kind)
    for _ in range(5):
        assert (route(torch.randn(3, 1), top_k, controller=constraint).weights == 1).all()
        assert constraint.open.all()
    assert constraint.importance.item() == (kind == "mean")


@pytest.mark.parametrize("top_k", [None, 2, 3])
def test_more_are_asked_for_than_are_open(top_k: int | None) -> None:
    constraint = ImportanceConstraint(3, 0.1)
    constraint.importance.copy_(torch.tensor([1.0, -2.0, 1.0]))
    logits = torch.randn(5, 3, requires_grad=True)
    output = route(logits, top_k, controller=constraint)
    assert torch.equal(output.weights, (output.indices == 1).float())
    output.weights.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert constraint.importance.tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------------ bias


def test_the_bias_evens_out_the_load_and_stays_in_evaluation() -> None:
    skew, bias = torch.linspace(0, 3, 6), LossFreeBias(6, 0.02)
    loads = []
    for mode in (False, True, False):
        bias.train(mode)
        for _ in range(300 if mode else 1):
            indices = route(torch.randn(2000 if not mode else 64, 6) + skew, 2, controller=bias).indices
        loads.append(torch.bincount(indices.flatten(), minlength=6) / indices.numel())
    assert loads[0].max() > 2 * loads[2].max()
    assert (loads[2] - 1 / 6).abs().max() < 0.04


def test_the_bias_is_in_soft_weights_and_not_in_those_of_the_chosen() -> None:
    bias, logits = LossFreeBias(3), torch.randn(4, 3)
    bias.bias.copy_(torch.tensor([0.0, 30.0, -1.0]))
    assert torch.equal(route(logits, controller=bias).weights, (logits + torch.tensor([0.0, 30.0, -1.0])).softmax(-1))
    output = route(logits, 2, controller=bias)
    assert (output.indices == 1)[:, 0].all()
    torch.testing.assert_close(output.weights, logits.gather(-1, output.indices).softmax(-1))


# -------------------------------------------------------------------------------------------------------------- messages


def test_messages() -> None:
    controllers = (ImportanceConstraint, LossFreeBias)
    for controller, num_experts in itertools.product(controllers, (0, 2.0)):
        with pytest.raises(
            ValueError, match=f"num_experts must be a whole number of at least 1, got num_experts={num_experts}"
        ):
            controller(num_experts)
    for controller, shape in itertools.product(controllers, [(), (3, 5), (4, 1)]):
        message = f"the last dimension of the logits must be num_experts=4, got shape {shape}"
        for training in (True, False):
            with pytest.raises(ValueError, match=re.escape(message)):
                controller(4).train(training)(torch.zeros(shape))
    for bound in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"bound must be a finite number of at least 0, got bound={bound}"):
            ImportanceConstraint(4, bound)
    with pytest.raises(ValueError, match="""kind must be "relative" or "mean", got kind='absolute'"""):
        ImportanceConstraint(4, kind="absolute")
    message = "momentum belongs to kind=\"mean\", got momentum=0.1, kind='relative'; leave it None"
    with pytest.raises(ValueError, match=message):
        ImportanceConstraint(4, momentum=0.1)
    for momentum in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"momentum must be None or in \(0, 1\], got momentum={momentum}"):
            ImportanceConstraint(4, kind="mean", momentum=momentum)
    for rate in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"rate must be a finite number above 0, got rate={rate}"):
            LossFreeBias(4, rate)
