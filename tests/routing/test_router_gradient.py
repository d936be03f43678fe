"""PrototypeRouter, metric "euclidean": the closed-form gradient, its own derivatives, and the memory that it takes."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_router import PrototypeRouter

FROM_TORCH = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",  # vmap loops over an operator for which it has no rule
    "ignore:.*torch.jit.script.* is deprecated",  # raised inside torch at its first forward-mode derivative
)


def probs_of(router: PrototypeRouter, x: Tensor, prototypes: Tensor, log_temperature: Tensor) -> Tensor:
    parameters = {"prototypes": prototypes, "log_temperature": log_temperature}
    return torch.func.functional_call(router, parameters, x).probs


def double_router() -> tuple[PrototypeRouter, tuple[Tensor, ...]]:
    router = PrototypeRouter(5, 4, learnable_temperature=True, temperature=0.7, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    return router, (x, router.prototypes, router.log_temperature)


@given(
    leading=st.sampled_from([(), (1,), (5,), (2, 3)]),
    dim=st.integers(1, 24),
    num_experts=st.integers(1, 9),
    temperature=st.sampled_from([0.3, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_gradient_is_that_of_equation_2(leading, dim: int, num_experts: int, temperature: float, dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, dim, generator=generator, dtype=dtype, requires_grad=True)
    router = PrototypeRouter(dim, num_experts, temperature=temperature, learnable_temperature=True, dtype=dtype)
    router.prototypes.data = torch.randn(num_experts, dim, generator=generator, dtype=dtype)
    inputs = (x, router.prototypes, router.log_temperature)
    slope = torch.randn(*leading, num_experts, generator=generator, dtype=dtype)
    grads = torch.autograd.grad(router(x).probs, inputs, slope)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    distances = torch.linalg.vector_norm(exact[0][..., None, :] - exact[1], dim=-1)
    expected = torch.autograd.grad((-distances / exact[2].exp()).softmax(-1), exact, slope.double())
    # float32 distances are off by the root of the rounding of |z|^2 where a token is near a prototype
    close = 1e-7 if dtype == torch.float64 else 1e-2
    for grad, wanted, tensor in zip(grads, expected, inputs, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == tensor.shape
        torch.testing.assert_close(grad.double(), wanted, rtol=close, atol=close)


@FROM_TORCH
def test_every_kind_of_derivative() -> None:
    router, inputs = double_router()

    def run(*tensors: Tensor) -> Tensor:
        return probs_of(router, *tensors)

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(run, inputs, **checks)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True)


@FROM_TORCH
def test_torch_func() -> None:
    router, inputs = double_router()
    x, prototypes, log_temperature = (tensor.detach() for tensor in inputs)

    def run(x: Tensor, prototypes: Tensor) -> Tensor:
        return probs_of(router, x, prototypes, log_temperature)

    def first(x: Tensor) -> Tensor:
        return run(x, prototypes)[..., 0].sum()

    by_rows, by_columns = torch.func.jacrev(run, (0, 1))(x, prototypes), torch.func.jacfwd(run, (0, 1))(x, prototypes)
    torch.testing.assert_close(by_rows, by_columns)
    torch.testing.assert_close(torch.func.hessian(first)(x), torch.autograd.functional.hessian(first, x))
    each = torch.func.vmap(torch.func.grad(first))(x)
    torch.testing.assert_close(each, torch.func.grad(first)(x))
    ensemble = torch.stack([prototypes, 2 * prototypes])
    many = torch.func.vmap(run, in_dims=(None, 0))(x, ensemble)
    torch.testing.assert_close(many, torch.stack([run(x, one) for one in ensemble]))


def test_a_distance_of_zero_gets_no_gradient_and_no_second_one() -> None:
    router = PrototypeRouter(4, 4, temperature=0.1)
    router.prototypes.data = 2 * torch.eye(4)  # norms whose squares are exact
    x = router.prototypes.detach().clone().requires_grad_()
    own = router(x).logits.diagonal()
    assert (own == 0).all()
    grads = torch.autograd.grad(own.sum(), (x, router.prototypes), create_graph=True)
    assert all((grad == 0).all() for grad in grads)
    slope = torch.randn(4, 4)
    grads = torch.autograd.grad(router(x).probs, (x, router.prototypes), slope, create_graph=True)
    seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, router.prototypes))
    assert all(grad.isfinite().all() for grad in (*grads, *seconds))


def test_nan_stays_in_its_row() -> None:
    router, x = PrototypeRouter(4, 3), torch.randn(5, 4)
    x[2, 1] = math.nan
    x.requires_grad_()
    probs = router(x).probs
    probs[:, 0].sum().backward()
    for tensor in (probs, x.grad):
        assert tensor[2].isnan().all()
        assert tensor[[0, 1, 3, 4]].isfinite().all()
    assert router.prototypes.grad.isnan().all()


def test_backward_is_float32_under_autocast() -> None:
    router, x = PrototypeRouter(64, 4), torch.randn(9, 64, requires_grad=True)
    slope = torch.randn(9, 4)
    expected = torch.autograd.grad(router(x).probs, (x, router.prototypes), slope)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(router(x).probs, (x, router.prototypes), slope)
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "dot"])
@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_no_memory_of_the_size_of_the_input_but_its_gradient(metric: str, input_needs_grad: bool) -> None:
    made: set[int] = set()
    alive: list[Tensor] = []  # so that no address is used twice

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= x.nbytes:
                    made.add(value.untyped_storage().data_ptr())
                    alive.append(value)
            return result

    router = PrototypeRouter(32, 4, metric=metric, learnable_temperature=True)
    x = torch.randn(2, 64, 32, requires_grad=input_needs_grad)
    inputs = [*router.parameters(), x][: 3 if input_needs_grad else 2]
    with Storages():
        torch.autograd.grad(router(x).probs.square().sum(), inputs)
    assert len(made - {x.data_ptr()}) == int(input_needs_grad)


def test_scores_match_the_reference_far_from_the_origin() -> None:
    # |z|^2 is 10^4 times the squared distance here
    x, router = torch.randn(50, 64) + 100, PrototypeRouter(64, 6)
    router.prototypes.data += 100
    expected = reference.scores(x, router.prototypes, "euclidean")
    torch.testing.assert_close(router(x).logits.double(), expected, rtol=2e-2, atol=0)
