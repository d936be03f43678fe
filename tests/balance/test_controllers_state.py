"""Controllers in a router: state, evaluation, recomputation, the compiler, operations."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from operations import SYNCHRONISING, Operations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_router import PrototypeRouter
from spectral_router.balance.controllers import ImportanceConstraint, LossFreeBias
from spectral_router.routing.route import route

MAKERS = {
    "relative": lambda: ImportanceConstraint(4, 0.1),
    "mean": lambda: ImportanceConstraint(4, 0.05, kind="mean"),
    "momentum": lambda: ImportanceConstraint(4, 0.05, kind="mean", momentum=0.3),
    "bias": lambda: LossFreeBias(4, 0.5),
}
ALL = pytest.mark.parametrize("kind", MAKERS)
TOP_K = pytest.mark.parametrize("top_k", [None, 1, 2, 4])
compiling = pytest.mark.filterwarnings(
    r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch",
    r"ignore:.*should not be instantiated:DeprecationWarning",  # torch 2.9, of every function that it traces
)


class Layer(nn.Module):
    """A router and its experts; the first expert is the one that all want."""

    def __init__(self, kind: str, top_k: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = PrototypeRouter(8, 4, top_k=top_k, metric="dot", controller=MAKERS[kind]())
        self.router.prototypes.data[0] += 1
        self.experts = nn.Parameter(torch.randn(4, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.router(x)[2:]
        placed = weights.new_zeros(len(x), 4).scatter(-1, indices, weights)
        return x + torch.einsum("td,kdo,tk->to", x, self.experts, placed).tanh()


def batches(number: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, 8, generator=generator) + 0.5 for _ in range(number)]


def state(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.state_dict().values()]


def choice(module: nn.Module) -> Tensor:
    """What the next training forward does to logits of zero."""
    return copy.deepcopy(module).train()(torch.zeros(4))


def trained(layer: Layer, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """One forward and backward: gradients of input and parameters, and the state after it."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    call(leaf).square().sum().backward()
    return [leaf.grad, *(parameter.grad for parameter in layer.parameters()), *state(layer)]


@ALL
@TOP_K
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_sees_what_the_forward_saw(kind: str, top_k: int | None, use_reentrant: bool) -> None:
    plain, spared = Layer(kind, top_k), Layer(kind, top_k)
    moved = 0
    call = partial(checkpoint, spared, use_reentrant=use_reentrant)
    for x in batches():
        before = choice(plain.router.controller)
        assert all(map(torch.equal, trained(plain, plain, x), trained(spared, call, x)))
        moved += not torch.equal(before, choice(plain.router.controller))
    assert moved > 3  # without which this would say nothing


@ALL
@TOP_K
def test_resumes_from_its_state(kind: str, top_k: int | None, tmp_path: Path) -> None:
    layer = Layer(kind, top_k)
    for x in batches()[:5]:
        layer(x)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    loaded = Layer(kind, top_k)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    twins = [layer, copy.deepcopy(layer), loaded]
    for x in batches()[5:]:
        outputs = [twin(x) for twin in twins]
        assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    fresh = Layer(kind, top_k)(x)
    assert (top_k == 4 and kind == "bias") or not torch.equal(fresh, outputs[0])
    assert all(all(map(torch.equal, state(layer), state(twin))) for twin in twins)
    layer.router.controller.reset_parameters()
    assert all(map(torch.equal, state(layer.router.controller), state(MAKERS[kind]())))
    assert torch.equal(layer(batches()[0]), Layer(kind, top_k)(batches()[0]))


def test_names_in_the_state() -> None:
    names = {kind: set(maker().state_dict()) for kind, maker in MAKERS.items()}
    mean = {"importance", "steps"}
    assert names == {"relative": {"importance"}, "mean": mean, "momentum": mean, "bias": {"bias"}}
    assert set(Layer("bias", 1).state_dict()) == {"experts", "router.prototypes", "router.controller.bias"}
    assert set(PrototypeRouter(8, 4).state_dict()) == {"prototypes"}
    assert not any(list(maker().parameters()) for maker in MAKERS.values())


@ALL
@TOP_K
def test_evaluation_counts_nothing(kind: str, top_k: int | None) -> None:
    layer = Layer(kind, top_k)
    for x in batches():
        layer(x)
    before = state(layer)
    x, router = batches()[0], layer.router.eval()
    free = PrototypeRouter(8, 4, top_k=top_k, metric="dot")
    free.prototypes.data.copy_(router.prototypes)
    same = all(map(torch.equal, router(x), free(x)))
    assert same == (kind != "bias")
    assert all(map(torch.equal, state(layer), before))
    router.train()
    with torch.no_grad():  # a generation, as loops of reinforcement learning run it in training mode
        for token in x.flatten(0, -2).split(1):
            router(token)
    assert all(map(torch.equal, state(layer), before))
    router(x)
    assert not all(map(torch.equal, state(layer), before))


@ALL
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_counted(kind: str, top_k: int | None, bad: float) -> None:
    controller = MAKERS[kind]()
    route(torch.randn(5, 4) + torch.arange(4), top_k, controller=controller)
    before = state(controller)
    logits = torch.randn(5, 4)
    logits[3] = bad
    assert route(logits, top_k, controller=controller).weights.isnan().any()
    assert route(torch.zeros(0, 4), top_k, controller=controller).weights.numel() == 0
    assert all(map(torch.equal, state(controller), before))
    route(torch.randn(5, 4) + torch.arange(4), top_k, controller=controller)
    assert not all(map(torch.equal, state(controller), before))
    assert all(buffer.isfinite().all() for buffer in state(controller))


@ALL
def test_stays_in_full_precision(kind: str) -> None:
    controller = MAKERS[kind]()
    route(torch.randn(7, 4), 2, controller=controller)
    before = state(controller)
    for moved in (controller.half(), controller.to(torch.bfloat16), nn.Sequential(controller).half()[0]):
        assert all(map(torch.equal, state(moved), before))
    assert all(buffer.is_meta for buffer in copy.deepcopy(controller).to("meta").buffers())
    default = torch.get_default_dtype()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        torch.set_default_dtype(dtype)
        try:
            other = MAKERS[kind]()
            route(torch.randn(7, 4), 2, controller=other)
        finally:
            torch.set_default_dtype(default)
        assert state(other)[0].dtype == expected


@ALL
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_autocast_and_half_inputs_count_in_float32(kind: str, top_k: int | None) -> None:
    logits = [torch.randn(64, 4).bfloat16() for _ in range(4)]
    one, other = MAKERS[kind](), MAKERS[kind]()
    for step in logits:
        expected = route(step.float(), top_k, controller=one)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = route(step, top_k, controller=other)
        assert torch.equal(output.weights, expected.weights.bfloat16())
        assert all(map(torch.equal, state(one), state(other)))


@compiling
@ALL
@pytest.mark.parametrize("top_k", [None, 2])
def test_compiled(kind: str, top_k: int | None) -> None:
    torch.compiler.reset()
    plain, quick = Layer(kind, top_k), Layer(kind, top_k)
    fast = torch.compile(quick, fullgraph=True, backend="aot_eager")
    for training in (True, True, True, False, True):
        plain.train(training), quick.train(training)
        x = batches()[0]
        for one, other in zip(trained(plain, plain, x), trained(quick, fast, x), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert not torch.equal(state(quick.router.controller)[0], state(MAKERS[kind]())[0])
    torch.compiler.reset()


@compiling
@ALL
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["compiled inside", "compiled outside"])
def test_recomputation_compiled(kind: str, use_reentrant: bool, whole: bool) -> None:
    torch.compiler.reset()
    plain, spared = Layer(kind, 2), Layer(kind, 2)
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    inner = spared if whole else compiled(spared)
    call = partial(checkpoint, inner, use_reentrant=use_reentrant)
    call = compiled(call) if whole else call
    for x in batches():
        for one, other in zip(trained(plain, plain, x), trained(spared, call, x), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@ALL
@TOP_K
def test_no_host_synchronisation(kind: str, top_k: int | None) -> None:
    layer, x = Layer(kind, top_k), batches()[0]
    for training in (True, False):
        with Operations() as operations:
            layer.train(training)(x).sum().backward()
        assert operations.count["scatter"] == 1 + training
        assert not operations.count.keys() & SYNCHRONISING


@ALL
@pytest.mark.parametrize("sync", [True, False])
def test_a_process_group_of_one_changes_nothing(kind: str, sync: bool, tmp_path: Path) -> None:
    alone, grouped = Layer(kind, 2), Layer(kind, 2)
    grouped.router.controller.sync = sync
    for x in batches():
        alone(x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for x in batches():
            grouped(x)
    finally:
        dist.destroy_process_group()
    assert all(map(torch.equal, state(alone), state(grouped)))


@ALL
def test_repr_is_the_call_that_makes_it(kind: str) -> None:
    for controller in (MAKERS[kind](), LossFreeBias(3, sync=False), ImportanceConstraint(3, sync=False)):
        assert repr(eval(repr(controller))) == repr(controller)
    assert repr(MAKERS[kind]()) in repr(PrototypeRouter(8, 4, controller=MAKERS[kind]()))
