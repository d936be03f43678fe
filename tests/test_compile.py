"""torch.compile without a graph break gives the values and gradients of eager mode."""

import copy
import shutil

import pytest
import torch
from inductor import QUICK_INDUCTOR
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, PrototypeRouter, SpectralRankPenalty

pytestmark = pytest.mark.filterwarnings(
    # raised inside torch while it traces its own decompositions
    r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch",
    r"ignore:.*should not be instantiated:DeprecationWarning",  # torch 2.9, of every function that it traces
)

SHAPES = [(4, 16), (8, 3), (4, 16), (8, 3), (5, 5)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: nn.Module, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(module, fullgraph=True, backend=backend)


def value_and_gradients(function, *inputs: Tensor) -> tuple[Tensor, ...]:
    value = function(*inputs)
    return (value.detach(), *torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "learnable_temperature": True}], ids=["soft", "top_k"])
def test_router(metric: str, options: dict[str, object]) -> None:
    router = PrototypeRouter(16, 6, metric=metric, **options)
    fast, x = compiled(router), torch.randn(3, 7, 16, requires_grad=True)
    torch.testing.assert_close(tuple(fast(x)), tuple(router(x)))
    wanted = (x, *router.parameters())
    slope = torch.randn_like(router(x).weights)
    grads = [torch.autograd.grad((module(x).weights * slope).sum(), wanted) for module in (fast, router)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["exact", "power"])
@pytest.mark.parametrize(
    "options",
    [{}, {"sigma_target": "initial", "relative": True}, {"center": True}],
    ids=["plain", "initial", "center"],
)
def test_penalty(solver: str, options: dict[str, object]) -> None:
    penalty = SpectralRankPenalty(solver=solver, **options)
    fast = compiled(copy.deepcopy(penalty))
    weights = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    # the first call makes the state, the second finds it there, the third sees what the second stored
    for _ in range(3):
        expected = value_and_gradients(lambda *w: penalty(w), *weights)
        torch.testing.assert_close(value_and_gradients(lambda *w: fast(w), *weights), expected, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for weight in weights:
                weight += 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False], [False, True, True]])], ids=["all", "mask"])
def test_loss(unbiased: bool, mask: Tensor | None) -> None:
    loss = LoadBalanceLoss(unbiased=unbiased)
    fast, probs = compiled(loss), torch.rand(2, 3, 5, requires_grad=True)
    expected = value_and_gradients(lambda p: loss(p, mask), probs)
    torch.testing.assert_close(value_and_gradients(lambda p: fast(p, mask), probs), expected)


class Objective(nn.Module):
    """A training step's worth of all three."""

    def __init__(self) -> None:
        super().__init__()
        self.router = PrototypeRouter(16, 6, top_k=2)
        self.penalty = SpectralRankPenalty("initial", relative=True, solver="power")
        self.balance = LoadBalanceLoss()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        output = self.router(x)
        return output.weights[..., 0].mean() + self.penalty([self.router.prototypes]) + self.balance(output.probs, mask)


@QUICK_INDUCTOR
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_all_three_with_inductor() -> None:
    slow = Objective()
    x, mask = torch.randn(3, 7, 16), torch.rand(3, 7) < 0.7
    slow(x, mask)  # makes the penalty's state, so that one graph serves both calls; the other backend has the first call too
    quick = copy.deepcopy(slow)
    fast = compiled(quick, "inductor")
    for _ in range(2):
        expected, value = slow(x, mask), fast(x, mask)
        expected.backward()
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick.router.prototypes.grad, slow.router.prototypes.grad, rtol=1e-3, atol=1e-4)
