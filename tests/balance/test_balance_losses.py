"""The relatives of LoadBalanceLoss against their formulas written with loops."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from operations import SYNCHRONISING, Operations
from test_compile import compiled, value_and_gradients
from test_losses import batches
from torch import Tensor

from spectral_router import LoadBalanceLoss, PrototypeRouter, functional
from spectral_router.balance.losses import ImportanceKLLoss, MutualInformationLoss, RouterZLoss, SwitchLoss

# the module, the function that it is a module over, and the loops
LOSSES: dict[str, tuple[Callable, Callable, Callable]] = {
    "kl": (ImportanceKLLoss(), functional.importance_kl_loss, reference.importance_kl_loss),
    "mi": (MutualInformationLoss(), functional.mutual_information_loss, reference.mutual_information_loss),
    "switch": (SwitchLoss(), functional.switch_loss, reference.switch_loss),
    "switch-2": (SwitchLoss(2), partial(functional.switch_loss, top_k=2), partial(reference.switch_loss, top_k=2)),
    "z": (RouterZLoss(), functional.router_z_loss, reference.router_z_loss),
}
EACH = pytest.mark.parametrize("kind", LOSSES)
MASKS = pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [False, True, True]])], ids=["all", "mask"])


def value_and_gradient(loss: Callable, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = values.detach().clone().requires_grad_()
    value = loss(leaf, mask)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


# ---------------------------------------------------------------------------------------------------------------- values


@given(batches(), st.sampled_from(list(LOSSES)))
def test_value_is_that_of_the_loops(batch: tuple[Tensor, Tensor | None], kind: str) -> None:
    values, mask = batch
    module, function, loops = LOSSES[kind]
    if kind.startswith("switch"):  # of equal entries any may be chosen
        ordered = values.sort(-1).values
        assume(values.shape[-1] > 1 and (ordered.diff(dim=-1) > 0).all())
    value = module(values, mask)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    close = 1e-12 if values.dtype == torch.float64 else 1e-5
    assert value.item() == pytest.approx(loops(values, mask), rel=close, abs=close)
    assert torch.equal(value, function(values, mask))


@given(batches(), st.sampled_from([1.0, 100.0, 1e4]))
def test_z_loss_of_large_logits(batch: tuple[Tensor, Tensor | None], scale: float) -> None:
    logits, mask = batch
    logits = scale * (logits - 0.5)
    close = 1e-12 if logits.dtype == torch.float64 else 1e-5
    assert functional.router_z_loss(logits, mask).item() == pytest.approx(reference.router_z_loss(logits, mask), rel=close)


@given(batches())
def test_losses_stay_in_their_ranges(batch: tuple[Tensor, Tensor | None]) -> None:
    probs, mask = batch
    num_experts = probs.shape[-1]
    most = math.log(num_experts) + 1e-6
    assert -1e-6 <= functional.importance_kl_loss(probs, mask) <= most
    assert -most <= functional.mutual_information_loss(probs, mask) <= 1e-6
    for top_k in range(1, num_experts + 1):
        assert 0 <= functional.switch_loss(probs, mask, top_k=top_k) <= num_experts / top_k * 1.01  # half precision


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_the_ends_of_the_ranges_are_reached(num_experts: int) -> None:
    logs = [1 / num_experts + math.log(num_experts), *2 * [math.log(math.e + num_experts - 1)]]
    even, sure = torch.full((5, num_experts), 1 / num_experts), torch.eye(num_experts)
    collapsed = sure[[1] * 5]
    for loss, values in {
        functional.importance_kl_loss: (0, 0, math.log(num_experts)),
        functional.mutual_information_loss: (0, -math.log(num_experts), 0),
        functional.switch_loss: (1, 1, num_experts),
        functional.router_z_loss: [log**2 for log in logs],
    }.items():
        for probs, expected in zip((even, sure, collapsed), values, strict=True):
            assert loss(probs).item() == pytest.approx(expected, abs=1e-6)
    assert functional.switch_loss(collapsed + even, top_k=num_experts).item() == pytest.approx(2)  # f is even: K mean(P)


def test_near_balance_the_divergence_is_half_the_squared_variation() -> None:
    probs = torch.full((1, 8), 1 / 8, dtype=torch.float64) + 1e-4 * torch.randn(1, 8, dtype=torch.float64)
    half = functional.load_balance_loss(probs).item() / 2
    assert functional.importance_kl_loss(probs).item() == pytest.approx(half, rel=1e-2)
    assert functional.importance_kl_loss(probs.float()).item() == pytest.approx(half, rel=1e-2)  # not lost to rounding


def test_information_is_of_entropies_and_rows_weigh_by_their_sums() -> None:
    probs = torch.randn(6, 4, dtype=torch.float64).softmax(-1)
    entropy = torch.special.entr(probs).sum(-1).mean() - torch.special.entr(probs.mean(0)).sum()
    torch.testing.assert_close(functional.mutual_information_loss(probs), entropy)
    weighted = probs * torch.tensor([1.0, 2, 1, 1, 1, 1])[:, None]
    torch.testing.assert_close(*map(functional.mutual_information_loss, (weighted, torch.cat([probs, probs[1:2]]))))


# ------------------------------------------------------------------------------------------------------------ degenerate


@EACH
@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (torch.rand(0, 4), None),
        (torch.rand(2, 0, 4), torch.ones(2, 0, dtype=torch.bool)),
        (torch.rand(5, 4), torch.zeros(5, dtype=torch.bool)),
    ],
    ids=["no token", "no token, mask", "all masked"],
)
def test_no_token_gives_zero_and_zero_gradient(kind: str, values: Tensor, mask: Tensor | None) -> None:
    value, grad = value_and_gradient(LOSSES[kind][0], values, mask)
    assert value == 0
    assert (grad == 0).all()


def test_one_expert_and_no_probability() -> None:
    one = torch.rand(5, 1)
    assert [LOSSES[kind][0](one).item() for kind in ("kl", "mi")] == [0, 0]
    assert LOSSES["switch"][0](torch.ones(5, 1)).item() == 1
    assert LOSSES["z"][0](one).item() == pytest.approx(one.square().mean().item())
    for kind in ("kl", "mi", "switch"):
        value, grad = value_and_gradient(LOSSES[kind][0], torch.zeros(5, 4))
        assert value == 0
        assert grad.isfinite().all()


@EACH
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e6])
def test_gradients_through_a_softmax_are_finite(kind: str, scale: float) -> None:
    """Probabilities that are exactly 0, where the logarithm has no slope."""
    logits = scale * torch.tensor([[1.0, 0, -1, 0.5], [2, 0, -1, 0.5], [0, 0, 3, 0.5]])
    loss = LOSSES[kind][0]
    read = loss if kind == "z" else lambda logits, mask: loss(logits.softmax(-1), mask)
    value, grad = value_and_gradient(read, logits)
    assert value.isfinite()
    assert grad.isfinite().all()


@EACH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_rows_are_never_read(kind: str, bad: float) -> None:
    values, mask = torch.randn(3, 4, 5).softmax(-1), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    padded = values.clone()
    padded[1, 2:] = bad
    clean, dirty = (value_and_gradient(LOSSES[kind][0], rows, mask) for rows in (values, padded))
    assert dirty[0].item() == pytest.approx(LOSSES[kind][2](values, mask), rel=1e-5)
    assert torch.equal(clean[1], dirty[1])
    assert (dirty[1][1, 2:] == 0).all()


@EACH
def test_a_counted_nan_is_not_hidden(kind: str) -> None:
    values = torch.full((3, 4), 0.25)
    values[0, 0] = math.nan
    assert LOSSES[kind][0](values).isnan()
    assert LOSSES[kind][0](values, torch.tensor([True, True, False])).isnan()


@EACH
@MASKS
def test_gradcheck(kind: str, mask: Tensor | None) -> None:
    values = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: LOSSES[kind][1](v, mask), values)
    assert torch.autograd.gradgradcheck(lambda v: LOSSES[kind][1](v, mask), values)


# ------------------------------------------------------------------------------------------- precision, compiler, device


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(4096, 8).softmax(-1).to(dtype)
    torch.testing.assert_close(LOSSES[kind][0](values), LOSSES[kind][0](values.float()))
    assert value_and_gradient(LOSSES[kind][0], values)[1].dtype == dtype


@EACH
def test_autocast_changes_nothing(kind: str) -> None:
    values = torch.randn(64, 8).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[kind][0](values)
    assert torch.equal(value, LOSSES[kind][0](values))


@pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
@EACH
@MASKS
def test_compiles_without_a_graph_break(kind: str, mask: Tensor | None) -> None:
    torch.compiler.reset()
    loss, values = LOSSES[kind][0], torch.rand(2, 3, 5, requires_grad=True)
    fast = compiled(copy.deepcopy(loss))
    expected = value_and_gradients(lambda v: loss(v, mask), values)
    torch.testing.assert_close(value_and_gradients(lambda v: fast(v, mask), values), expected)
    torch.compiler.reset()


@EACH
def test_nothing_is_read_back_from_the_device(kind: str) -> None:
    with Operations() as operations:
        value_and_gradient(LOSSES[kind][0], torch.rand(3, 5), torch.tensor([True, False, True]))
    assert operations.count
    assert not SYNCHRONISING & set(operations.count)


# -------------------------------------------------------------------------------------------------------------- messages


@EACH
def test_message_input(kind: str) -> None:
    loss, name = LOSSES[kind][0], "logits" if kind == "z" else "probs"
    with pytest.raises(TypeError, match=rf"{name} must be a tensor, got RouterOutput; of a RouterOutput pass \.{name}"):
        loss(PrototypeRouter(4, 2)(torch.randn(3, 4)))
    with pytest.raises(ValueError, match=rf"{name} must have shape \(\*, experts\) with at least one .*, got shape \(3, 0\)"):
        loss(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=rf"{name} must be floating point, got torch\.int64; pass .*, not expert indices"):
        loss(torch.zeros(3, 4, dtype=torch.int64))
    message = rf"mask must have the shape of {name} without its last dimension, \(3, 4\), got \(12,\); reshape it to one entry"
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(3, 4, 5), torch.ones(12))


def test_message_top_k() -> None:
    for wrong in (0, -1, 1.5, None, True):
        for function in (SwitchLoss, lambda top_k: functional.switch_loss(torch.rand(3, 4), top_k=top_k)):
            with pytest.raises(ValueError, match=f"top_k must be a whole number between 1 and num_experts, got top_k={wrong}"):
                function(wrong)
    with pytest.raises(ValueError, match=r"top_k must be a whole number .* num_experts, got top_k=5, num_experts=4"):
        SwitchLoss(5)(torch.rand(3, 4))


@pytest.mark.parametrize("sync", [False, True])
def test_repr_is_the_call_that_makes_it(sync: bool) -> None:
    for loss in (ImportanceKLLoss(sync=sync), MutualInformationLoss(sync=sync), SwitchLoss(3, sync=sync), RouterZLoss()):
        assert loss.state_dict() == {}
        again = eval(repr(loss))
        assert repr(again) == repr(loss)
        assert vars(again).get("sync") == vars(loss).get("sync")
    assert [getattr(loss, "reads", "probs") for loss in (LoadBalanceLoss(), RouterZLoss())] == ["probs", "logits"]
