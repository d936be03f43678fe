"""LoadBalanceLoss and functional.load_balance_loss against equation 6 written with loops."""

import copy
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_router import LoadBalanceLoss, PrototypeRouter
from spectral_router.functional import load_balance_loss


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    """Probabilities (*, K), from nearly uniform to nearly one-hot, and a mask (*) or None."""
    leading = draw(st.sampled_from([(), (1,), (7,), (3, 5), (2, 1, 4), (0,), (3, 0)]))
    num_experts = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(*leading, num_experts, generator=generator)
    probs = logits.softmax(-1).to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
    share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    if share is None:
        return probs, None
    mask = torch.rand(leading, generator=generator) < share
    return probs, mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))


@given(batches(), st.booleans())
def test_loss_is_equation_6(batch: tuple[Tensor, Tensor | None], unbiased: bool) -> None:
    probs, mask = batch
    value = LoadBalanceLoss(unbiased=unbiased)(probs, mask)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if probs.dtype == torch.float64 else torch.float32)
    close = 1e-12 if probs.dtype == torch.float64 else 1e-4
    expected = reference.load_balance_loss(probs, mask, unbiased)
    assert value.item() == pytest.approx(expected, rel=close, abs=close * 1e-3)
    assert torch.equal(value, load_balance_loss(probs, mask, unbiased=unbiased))


@given(batches())
def test_loss_stays_in_its_range(batch: tuple[Tensor, Tensor | None]) -> None:
    probs, mask = batch
    num_experts = probs.shape[-1]
    assert 0 <= load_balance_loss(probs, mask) <= (num_experts - 1) * (1 + 1e-6)
    assert 0 <= load_balance_loss(probs, mask, unbiased=True) <= num_experts * (1 + 1e-6)


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_the_ends_of_the_range_are_reached(num_experts: int) -> None:
    uniform = torch.full((5, num_experts), 1 / num_experts)
    collapsed = torch.eye(num_experts)[[1] * 5]
    assert load_balance_loss(uniform).item() == pytest.approx(0, abs=1e-12)
    assert load_balance_loss(torch.eye(num_experts)).item() == 0  # balance is over the batch, not within a token
    assert load_balance_loss(collapsed).item() == pytest.approx(num_experts - 1)
    assert load_balance_loss(collapsed, unbiased=True).item() == pytest.approx(num_experts)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("probs", "mask"),
    [
        (torch.rand(5, 1), None),
        (torch.rand(0, 4), None),
        (torch.rand(2, 0, 4), torch.ones(2, 0, dtype=torch.bool)),
        (torch.rand(5, 4), torch.zeros(5, dtype=torch.bool)),
        (torch.zeros(5, 4), None),
    ],
    ids=["one expert", "no token", "no token, mask", "all masked", "no probability"],
)
def test_nothing_to_balance_gives_zero_and_zero_gradient(probs: Tensor, mask: Tensor | None, unbiased: bool) -> None:
    probs = probs.clone().requires_grad_()
    value = load_balance_loss(probs, mask, unbiased=unbiased)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert (probs.grad.abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    # 4096 tokens: a bfloat16 sum stops growing at 256 times its addend
    probs = torch.randn(4096, 8).softmax(-1).to(dtype)
    torch.testing.assert_close(load_balance_loss(probs), load_balance_loss(probs.float()))
    leaf = probs.requires_grad_()
    load_balance_loss(leaf).backward()
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_rows_are_never_read(bad: float) -> None:
    probs, mask = torch.randn(3, 4, 5).softmax(-1), torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    padded = probs.clone()
    padded[1, 2:] = bad
    grads = []
    for rows in (probs, padded):
        leaf = rows.clone().requires_grad_()
        value = load_balance_loss(leaf, mask)
        value.backward()
        grads.append(leaf.grad)
        assert value.item() == pytest.approx(reference.load_balance_loss(probs, mask))
    assert torch.equal(*grads)
    assert (grads[1][1, 2:] == 0).all()


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_counted_nan_is_not_hidden(unbiased: bool) -> None:
    probs = torch.full((3, 4), 0.25)
    probs[0, 0] = math.nan
    assert load_balance_loss(probs, unbiased=unbiased).isnan()
    assert load_balance_loss(probs, torch.tensor([True, True, False]), unbiased=unbiased).isnan()


def test_scale_of_the_rows_does_not_matter() -> None:
    probs = torch.rand(6, 4)
    torch.testing.assert_close(load_balance_loss(1000 * probs), load_balance_loss(probs))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [False, True, True]])])
def test_gradcheck(unbiased: bool, mask: Tensor | None) -> None:
    probs = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: load_balance_loss(p, mask, unbiased=unbiased), probs)
    assert torch.autograd.gradgradcheck(lambda p: load_balance_loss(p, mask, unbiased=unbiased), probs)


def test_autocast_changes_nothing() -> None:
    probs = torch.randn(64, 8).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        value = load_balance_loss(probs)
    assert torch.equal(value, load_balance_loss(probs))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_message_no_experts(shape: tuple[int, ...]) -> None:
    message = rf"probs must have shape \(\*, experts\) with at least one expert, got shape \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=message):
        LoadBalanceLoss()(torch.zeros(shape))


def test_message_not_probabilities() -> None:
    message = r"probs must be floating point, got torch\.int64; pass probabilities, not expert indices"
    with pytest.raises(TypeError, match=message):
        LoadBalanceLoss()(torch.zeros(3, 4, dtype=torch.int64))


def test_message_a_whole_router_output() -> None:
    with pytest.raises(TypeError, match=r"probs must be a tensor, got RouterOutput; of a RouterOutput pass \.probs"):
        LoadBalanceLoss()(PrototypeRouter(4, 2)(torch.randn(3, 4)))


@pytest.mark.parametrize("shape", [(3, 4, 5), (4,), (3, 1), (12,), ()])
def test_message_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    message = (
        r"mask must have the shape of probs without its last dimension, \(3, 4\), "
        rf"got \({', '.join(map(str, shape))},?\); reshape it to one entry a token"
    )
    with pytest.raises(ValueError, match=message):
        LoadBalanceLoss()(torch.zeros(3, 4, 5), torch.ones(shape, dtype=torch.bool))


def test_module_is_stateless_and_says_what_it_is() -> None:
    loss = LoadBalanceLoss(unbiased=True)
    assert loss.state_dict() == {}
    assert repr(copy.deepcopy(loss)) == "LoadBalanceLoss(unbiased=True)"
