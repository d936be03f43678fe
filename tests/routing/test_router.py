"""PrototypeRouter: routing against equation 2 with explicit distances, numerics, state and initialisation."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_router import PrototypeRouter

METRIC_NAMES = ["euclidean", "sqeuclidean", "cosine", "dot"]
SINGLE_OR_HALF = [torch.float32, torch.bfloat16, torch.float16]
METRICS = pytest.mark.parametrize("metric", METRIC_NAMES)


# --------------------------------------------------------------------------------------------------------------- routing


@given(
    leading=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3)]),
    dim=st.integers(1, 24),
    num_experts=st.integers(1, 9),
    metric=st.sampled_from(METRIC_NAMES),
    temperature=st.sampled_from([0.3, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_routing_is_equation_2(leading, dim: int, num_experts: int, metric: str, temperature: float, dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, dim, generator=generator, dtype=dtype)
    router = PrototypeRouter(dim, num_experts, metric=metric, temperature=temperature, dtype=dtype)
    router.prototypes.data = torch.randn(num_experts, dim, generator=generator, dtype=dtype)
    logits, probs, weights, indices = router(x)
    assert logits.shape == probs.shape == weights.shape == indices.shape == (*leading, num_experts)
    close = 1e-8 if dtype == torch.float64 else 1e-3  # the root of the rounding of |z|^2, where a token is near a prototype
    expected = reference.route(x.reshape(-1, dim), router.prototypes, temperature, metric).reshape(probs.shape)
    torch.testing.assert_close(probs.double(), expected, rtol=close, atol=close)
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert torch.equal(weights, probs)
    assert torch.equal(indices, torch.arange(num_experts).expand(indices.shape))


@METRICS
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_scores_away_from_prototypes_are_exact_to_rounding(metric: str, dtype: torch.dtype, close: float) -> None:
    x, temperature = torch.randn(50, 64, dtype=dtype), 0.125
    router = PrototypeRouter(64, 6, metric=metric, temperature=temperature, dtype=dtype)
    expected = reference.scores(x, router.prototypes, metric)
    if metric == "sqeuclidean":  # |z|^2 is the same for every expert and left out
        expected = expected + x.double().square().sum(-1, keepdim=True)
    torch.testing.assert_close(router(x).logits.double() * temperature, expected, rtol=close, atol=4 * close)


@METRICS
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_keeps_the_best_and_renormalises(metric: str, top_k: int) -> None:
    x = torch.randn(3, 7, 8)
    soft = PrototypeRouter(8, 5, metric=metric, temperature=0.2)
    hard = PrototypeRouter(8, 5, metric=metric, temperature=0.2, top_k=top_k)
    hard.load_state_dict(soft.state_dict())
    logits, probs, weights, indices = hard(x)
    assert weights.shape == indices.shape == (3, 7, top_k)
    assert indices.dtype == torch.int64
    assert torch.equal(probs, soft(x).probs)
    assert torch.equal(indices, logits.argsort(-1, descending=True)[..., :top_k])
    torch.testing.assert_close(weights, logits.gather(-1, indices).softmax(-1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))
    chosen = probs.gather(-1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    if top_k == 5:
        torch.testing.assert_close(torch.zeros_like(probs).scatter(-1, indices, weights), probs)


@METRICS
@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck(metric: str, top_k: int | None) -> None:
    router = PrototypeRouter(5, 4, metric=metric, top_k=top_k, learnable_temperature=True, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, prototypes: Tensor, log_temperature: Tensor) -> tuple[Tensor, ...]:
        parameters = {"prototypes": prototypes, "log_temperature": log_temperature}
        return torch.func.functional_call(router, parameters, x)[:3]

    assert torch.autograd.gradcheck(run, (x, router.prototypes, router.log_temperature))


# -------------------------------------------------------------------------------------------------------------- numerics


@METRICS
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_gradients_are_finite_exactly_at_a_prototype(metric: str, whole_numbers: bool) -> None:
    router = PrototypeRouter(8, 4, metric=metric, temperature=0.1)
    if whole_numbers:  # then the squared distance is exactly zero, and not a rounding of it
        router.prototypes.data = torch.randint(-3, 4, (4, 8)).float() + torch.eye(4, 8)
    x = router.prototypes.detach().clone().requires_grad_()
    (router(x).probs * torch.randn(4, 4)).sum().backward()
    assert x.grad.isfinite().all()
    assert router.prototypes.grad.isfinite().all()
    if metric == "euclidean":
        # the distance has a kink at its own prototype, of slope zero here
        (own,) = torch.autograd.grad(router(x).logits.diagonal().sum(), x)
        assert own.abs().max() < 1e-2


def test_zero_vector_has_no_direction_and_gets_no_gradient() -> None:
    # padding: x / max(|x|, eps) would hand such a token a gradient of 1 / eps
    router = PrototypeRouter(8, 4, metric="cosine")
    x = torch.zeros(3, 8, requires_grad=True)
    output = router(x)
    assert (output.logits == 0).all()
    (output.probs * torch.randn(3, 4)).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() <= 1
    assert router.prototypes.grad.isfinite().all()


@METRICS
def test_no_tensor_of_tokens_by_experts_by_dim(metric: str) -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                # an expanded view holds no memory of its own
                if isinstance(value, Tensor) and value.untyped_storage().nbytes() > 0:
                    largest = max(largest, min(value.numel(), value.untyped_storage().nbytes() // value.element_size()))
            return result

    tokens, num_experts, dim = 64, 16, 32
    router = PrototypeRouter(dim, num_experts, metric=metric, top_k=2, learnable_temperature=True)
    x = torch.randn(tokens, dim, requires_grad=True)
    with Sizes():
        output = router(x)
        (output.weights.sum() + output.probs.square().sum()).backward()
    assert tokens * dim <= largest < tokens * num_experts * dim


@METRICS
def test_scores_are_float32_under_autocast(metric: str) -> None:
    # near a prototype that is far from the origin, |z|^2 - 2 z mu + |mu|^2 in bfloat16 would be all rounding
    router = PrototypeRouter(32, 4, metric=metric)
    router.prototypes.data += 30
    x = (router.prototypes.detach()[[0, 1, 2, 3]] + 0.3 * torch.randn(4, 32)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = router(x)
    expected = router(x.float())
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.probs, expected.probs)


@METRICS
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("inputs", "module"),
    [
        (torch.float64, torch.float64),
        *((inputs, module) for inputs in SINGLE_OR_HALF for module in SINGLE_OR_HALF),
    ],
)
def test_dtype_of_every_output(metric: str, top_k: int | None, inputs: torch.dtype, module: torch.dtype) -> None:
    router = PrototypeRouter(8, 4, metric=metric, top_k=top_k).to(module)
    x = torch.randn(5, 8, dtype=inputs, requires_grad=True)
    logits, probs, weights, indices = router(x)
    full = torch.float64 if inputs == torch.float64 else torch.float32
    assert (logits.dtype, probs.dtype, weights.dtype, indices.dtype) == (full, full, inputs, torch.int64)
    weights.sum().backward()
    assert x.grad.dtype == inputs
    assert router.prototypes.grad.dtype == module


@METRICS
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (2, 3, 4, 6)])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_any_leading_dimensions(metric: str, shape: tuple[int, ...], top_k: int | None) -> None:
    router = PrototypeRouter(6, 3, metric=metric, top_k=top_k)
    x = torch.randn(shape, requires_grad=True)
    output = router(x)
    assert output.logits.shape == output.probs.shape == (*shape[:-1], 3)
    assert output.weights.shape == output.indices.shape == (*shape[:-1], top_k or 3)
    output.probs.sum().backward()
    assert x.grad.shape == shape


@METRICS
def test_one_expert_gets_everything(metric: str) -> None:
    for top_k in (None, 1):
        output = PrototypeRouter(1, 1, metric=metric, top_k=top_k)(torch.randn(5, 1))
        assert (output.weights == 1).all()
        assert (output.indices == 0).all()


def test_float64_inputs_or_prototypes_raise_the_precision_of_the_scores() -> None:
    x, router = torch.randn(5, 6), PrototypeRouter(6, 3)
    for tokens, module in ((x.double(), router), (x, PrototypeRouter(6, 3, dtype=torch.float64))):
        logits, probs, weights, _ = module(tokens)
        assert logits.dtype == probs.dtype == torch.float64
        assert weights.dtype == tokens.dtype
