"""The spectral functions in use: half precision, autocast, function transforms, second derivatives, messages."""

import math

import pytest
import torch
from torch import Tensor

from spectral_router.functional import spectral_norm, spectral_rank_penalty, stable_rank

FUNCTIONS = pytest.mark.parametrize("function", [spectral_norm, stable_rank, spectral_rank_penalty])


def gradient(function, weight: Tensor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_gets_gradients_of_its_own_dtype(function, dtype: torch.dtype) -> None:
    weight = torch.randn(2, 4, 8).to(dtype)
    assert torch.equal(function(weight), function(weight.float()))
    assert torch.equal(gradient(function, weight), gradient(function, weight.float()).to(dtype))


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(function, dtype: torch.dtype) -> None:
    weight = torch.randn(2, 8, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = function(weight), gradient(function, weight)
    assert torch.equal(value, function(weight))
    assert torch.equal(grad, gradient(function, weight))


@FUNCTIONS
def test_second_derivative_is_refused_in_clear_words(function) -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(function(weight), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="closed-form first derivative only, got a request for the second; take the penalty"):
        grad.square().sum().backward()


@FUNCTIONS
def test_create_graph_alone_is_fine(function) -> None:
    # gradient penalties and meta-learning set create_graph for the whole loss: the first derivative must still be there
    weight = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(function(weight), weight, create_graph=True)
    torch.testing.assert_close(grad.detach(), gradient(function, weight))
    # a second derivative that does not pass through the spectral part
    (weight * grad.detach()).sum().backward()
    torch.testing.assert_close(weight.grad, grad.detach())


@FUNCTIONS
def test_torch_func_grad(function) -> None:
    weight = torch.randn(2, 5, 3)
    torch.testing.assert_close(torch.func.grad(lambda w: function(w).sum())(weight), gradient(function, weight))


@FUNCTIONS
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 3, 0)])
def test_message_not_a_matrix(function, shape: tuple[int, ...]) -> None:
    message = rf"weight must hold matrices, shape \(\*, m, n\) with m, n >= 1, got shape \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape))


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_message_not_floating_point(function, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"weight must be floating point, got {dtype}; dequantise or convert it first"):
        function(torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize("target", [-1.0, -1e-9, math.inf, math.nan])
def test_message_sigma_target(target: float) -> None:
    with pytest.raises(ValueError, match=f"sigma_target must be a finite number of at least 0, got sigma_target={target}"):
        spectral_rank_penalty(torch.eye(3), target)


def test_message_relative_to_zero() -> None:
    assert spectral_rank_penalty(torch.eye(3), 0).item() == 1
    with pytest.raises(
        ValueError, match="sigma_target must be above 0 when relative=True, got sigma_target=0; it is divided by"
    ):
        spectral_rank_penalty(torch.eye(3), 0, relative=True)


@pytest.mark.parametrize("target", [0.99, 0, -1, math.nan])
def test_message_rank_target_too_low(target: float) -> None:
    with pytest.raises(
        ValueError, match=f"rank_target must be at least 1, the least stable rank there is, got rank_target={target}"
    ):
        spectral_rank_penalty(torch.eye(3), rank_target=target)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
@pytest.mark.parametrize("target", [3.01, math.inf])
def test_message_rank_target_out_of_reach(shape: tuple[int, int], target: float) -> None:
    assert spectral_rank_penalty(torch.eye(*shape), rank_target=3).item() == 0
    message = (
        rf"rank_target must be at most min\(num_experts, dim\) = 3, the largest stable rank that a matrix of shape "
        rf"\({shape[0]}, {shape[1]}\) can reach, got rank_target={target}"
    )
    with pytest.raises(ValueError, match=message):
        spectral_rank_penalty(torch.eye(*shape), rank_target=target)


def test_message_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"weight must be a tensor, got Linear; of a module pass \.weight"):
        spectral_norm(torch.nn.Linear(3, 2))
    with pytest.raises(TypeError, match="sigma_target must be a number or a tensor, got sigma_target='initial'"):
        spectral_rank_penalty(torch.eye(3), "initial")
