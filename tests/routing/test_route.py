"""route: what every router does after its logits, with and without a controller."""

import math
import re

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectral_router import PrototypeRouter
from spectral_router.routing.route import route


class Fixed(nn.Module):
    """A controller that adds the same to every token's logits, and keeps what it is told."""

    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("offset", offset)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.offset

    def observe(self, weights: Tensor, indices: Tensor) -> None:
        self.seen.append((weights, indices))


@given(
    shape=st.sampled_from([(), (5,), (2, 3), (0,), (4, 0)]),
    num_experts=st.integers(1, 7),
    keep=st.sampled_from([None, 1, 2, 7]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    closed=st.integers(0, 6),
    seed=st.integers(0, 999),
)
def test_against_one_token_at_a_time(
    shape: tuple[int, ...],
    num_experts: int,
    keep: int | None,
    dtype: torch.dtype,
    scale: float,
    closed: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = None if keep is None else min(keep, num_experts)
    logits = (scale * torch.randn(*shape, num_experts, generator=generator)).to(dtype)
    # apart from each other by more than any logits, so that the choice has no ties
    offset = 1e3 * (1.0 + torch.randperm(num_experts, generator=generator))
    offset[torch.randperm(num_experts, generator=generator)[: min(closed, num_experts - 1)]] = -math.inf
    controller = Fixed(offset)
    output = route(logits, top_k, controller=controller)
    wide = torch.promote_types(dtype, torch.float32)
    assert (output.logits.dtype, output.probs.dtype, output.weights.dtype) == (wide, wide, dtype)
    assert output.indices.dtype == torch.int64
    assert output.weights.shape == output.indices.shape == (*shape, top_k or num_experts)
    assert torch.equal(output.logits, logits.to(wide))
    assert torch.equal(output.probs, logits.to(wide).softmax(-1))
    ((weights, indices),) = controller.seen
    assert indices is output.indices
    assert weights.dtype == wide
    assert torch.equal(weights.to(dtype), output.weights)
    got = torch.zeros(*shape, num_experts, dtype=torch.float64).scatter(-1, indices, weights.double()).reshape(-1, num_experts)
    rows = logits.double().reshape(-1, num_experts).tolist()
    choices = (logits.double() + offset).reshape(-1, num_experts).tolist()
    wanted = [reference.combine_weights(row, choice, top_k) for row, choice in zip(rows, choices, strict=True)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, torch.tensor(other, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_controller_that_changes_nothing(top_k: int | None, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5, 6, dtype=dtype)
    plain, controlled = route(logits, top_k), route(logits, top_k, controller=Fixed(torch.zeros(6)))
    for one, other in zip(plain, controlled, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("top_k", [None, 1, 2, 6])
def test_of_a_routers_logits_it_is_the_router(top_k: int | None) -> None:
    router, x = PrototypeRouter(8, 6, top_k=top_k), torch.randn(3, 5, 8)
    output = router(x)
    for one, other in zip(output, route(output.logits, top_k), strict=True):
        assert torch.equal(one, other)
    expected = output.logits.softmax(-1), torch.arange(6).expand(3, 5, 6)
    if top_k:
        best, indices = output.logits.topk(top_k)
        expected = best.softmax(-1), indices
    assert all(map(torch.equal, output[2:], expected))


@pytest.mark.parametrize("top_k", [None, 1, 3, 4])
def test_closed_experts_have_no_weight_and_gradients_are_finite(top_k: int | None) -> None:
    logits = torch.randn(7, 4, requires_grad=True)
    closed = Fixed(torch.tensor([-math.inf, 0.0, -math.inf, -math.inf]))
    output = route(logits, top_k, controller=closed)
    assert torch.equal(output.weights, (output.indices == 1).float())
    (output.weights * torch.randn_like(output.weights)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # one open expert has all the weight, whatever the logits


def test_an_open_pair_shares_the_gradient_and_closed_ones_get_none() -> None:
    logits = torch.randn(7, 4, requires_grad=True)
    output = route(logits, 3, controller=Fixed(torch.tensor([-math.inf, 0.0, -math.inf, 5.0])))
    output.weights.square().sum().backward()
    assert (logits.grad[:, [0, 2]] == 0).all()
    assert (logits.grad[:, [1, 3]].abs() > 0).all()
    torch.testing.assert_close(output.weights[:, :2].flip(-1), logits[:, [1, 3]].softmax(-1))  # without the offset


def test_dtype_of_the_weights() -> None:
    logits = torch.randn(5, 4, dtype=torch.bfloat16)
    assert route(logits, 2, dtype=torch.float32).weights.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = route(logits.float() @ torch.eye(4), 2)
        assert output.probs.dtype == torch.float32
        assert output.weights.dtype == torch.bfloat16


def test_a_controller_computes_in_full_precision() -> None:
    class Mixed(Fixed):
        def forward(self, logits: Tensor) -> Tensor:
            return logits @ self.offset

    logits, mix = torch.randn(5, 4), torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = route(logits, controller=Mixed(mix)).weights
    assert torch.equal(weights, (logits @ mix).softmax(-1))


@pytest.mark.parametrize("top_k", [None, 2])
def test_nan_stays_in_its_row(top_k: int | None) -> None:
    logits = torch.randn(3, 4)
    logits[1, 2] = math.nan
    for controller in (None, Fixed(torch.zeros(4))):
        bad = route(logits, top_k, controller=controller).weights.isnan()
        assert bad[1].all()
        assert not bad[[0, 2]].any()


def test_no_tokens() -> None:
    for shape in [(0, 4), (3, 0, 4)]:
        assert route(torch.zeros(shape), 2).weights.shape == (*shape[:-1], 2)


def test_messages() -> None:
    for top_k in (0, 9, 2.0, True):
        message = f"top_k must be a whole number between 1 and num_experts, got top_k={top_k}, num_experts=8"
        with pytest.raises(ValueError, match=message):
            route(torch.zeros(2, 8), top_k)
    with pytest.raises(
        TypeError, match=re.escape("logits must be floating point, got torch.int64; pass the scores of the gate")
    ):
        route(torch.zeros(2, 8, dtype=torch.int64))
    for shape in [(), (3, 0)]:
        message = f"logits must have shape (*, experts) with at least one expert, got shape {shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            route(torch.zeros(shape))
