"""Models as engines have them: in several parts, in shells, with blocks replaced, compiled block by block."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from spectral_router import MoEHandle, SpectralRankPenalty, find_gates, wrap_moe
from spectral_router.functional import spectral_rank_penalty

# dynamo's own, about tensors it looks at
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        return x + sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts, strict=True))


class WithLoss(nn.Sequential):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x).square().mean()}


class Held(nn.Module):
    """`module` is a name like others in what is no engine."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def penalty(model: nn.Module) -> Tensor:
    return sum(spectral_rank_penalty(m.router.weight, 2.0) for m in model.modules() if isinstance(m, Block))


# --------------------------------------------------------------------------------------------------------------- names


def test_names_have_no_shells() -> None:
    model = nn.Sequential(checkpoint_wrapper(Block()), torch.compile(Block()), nn.DataParallel(Block()), Held())
    expected = ["0.router", "1.router", "2.router", "3.module.router"]
    assert [gate.name for gate in find_gates(model)] == expected
    with pytest.warns(UserWarning, match="compiled before wrap_moe"):
        handle = wrap_moe(model)
    assert [gate.name for gate in handle.gates] == expected
    assert list(handle.metrics()) == expected
    handle.remove()
    assert [gate.name for gate in wrap_moe(nn.Sequential(checkpoint_wrapper(Block())), gates="0.router").gates] == ["0.router"]


@pytest.mark.parametrize("old", [False, True], ids=["now", "as saved before"])
def test_state_of_one_setting_loads_in_another(old: bool) -> None:
    plain, saved = nn.Sequential(Block()), nn.Sequential(checkpoint_wrapper(Block()))
    handle, other = (wrap_moe(model, penalty=SpectralRankPenalty("initial")) for model in (plain, saved))
    other.metrics()
    state = other.state_dict()
    if old:
        state["gates"] = {f"module.0._checkpoint_wrapped_module.{name[2:]}": shape for name, shape in state["gates"].items()}
    handle.load_state_dict(state)
    assert torch.equal(handle.penalty.anchor, other.penalty.anchor)


# --------------------------------------------------------------------------------------------------------------- parts


def test_each_part_has_the_term_of_its_own_gates() -> None:
    parts = [nn.Sequential(Block(), Block()), WithLoss(Block())]
    x = torch.randn(8, 16)
    task = parts[1](parts[0](x))["loss"]
    handle = wrap_moe(parts, penalty=SpectralRankPenalty(2.0), balance=None, penalty_coef=1.0)
    assert [gate.name for gate in handle.gates] == ["0.0.router", "0.1.router", "1.0.router"]
    assert MoEHandle.of(parts[0]) is MoEHandle.of(parts[1]) is handle
    hidden = parts[0](x)
    first = handle.loss()
    torch.testing.assert_close(first, penalty(parts[0]))
    last = parts[1](hidden)["loss"]
    torch.testing.assert_close(last, task + penalty(parts[1]))
    (first + last).backward()
    rows = handle.metrics()
    assert all(row["penalty"] > 0 for row in rows.values())
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def test_anchors_of_all_parts_are_kept() -> None:
    parts = [nn.Sequential(Block()), nn.Sequential(Block()), nn.Sequential(nn.Linear(16, 16))]
    handle = wrap_moe(parts, penalty=SpectralRankPenalty("initial"), balance=None)
    x = torch.randn(8, 16)
    for part in parts:
        x = part(x)
        handle.loss()
    assert handle.penalty.anchor.isfinite().all()
    assert len(handle.penalty.anchor) == 2


def test_at_the_step_of_one_optimizer() -> None:
    parts = [nn.Sequential(Block()), nn.Sequential(Block())]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.0)
    wrap_moe(parts, optimizer, penalty=SpectralRankPenalty(2.0), balance=None, penalty_coef=1.0)
    output = parts[1](parts[0](torch.randn(8, 16))).square().mean()
    routers = [part[0].router.weight for part in parts]
    expected = torch.autograd.grad(output + sum(map(penalty, parts)), routers, retain_graph=True)
    output.backward()
    optimizer.step()
    for router, gradient in zip(routers, expected, strict=True):
        torch.testing.assert_close(router.grad, gradient)


@pytest.mark.parametrize("bad", [[], [nn.Linear(2, 2), "decoder"], 3])
def test_what_is_no_model(bad: object) -> None:
    with pytest.raises(TypeError, match=r"model must be a module, or a list of the modules|not iterable"):
        wrap_moe(bad)


# ------------------------------------------------------------------------------------------------------------ replaced


def test_a_block_replaced_after_wrapping_is_followed() -> None:
    model = WithLoss(Block())
    handle = wrap_moe(model, penalty=SpectralRankPenalty(2.0), penalty_coef=1.0, balance=None)
    new = model[0] = Block()  # as an engine does in its own initialisation
    x = torch.randn(8, 16)
    task = WithLoss(copy.deepcopy(new))(x)["loss"]
    torch.testing.assert_close(model(x)["loss"], task + penalty(model))
    assert handle.gates[0].module is new.router
    handle.remove()
    assert not new.router._forward_hooks


def test_a_block_replaced_by_something_else_is_told() -> None:
    model = WithLoss(Block(), Block())
    wrap_moe(model, balance=None)
    model[1] = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match=r"no longer in the model, their modules were replaced since wrap_moe: 1\.router"):
        model(torch.randn(8, 16))


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("delivery", ["in the loss", "at the step"])
def test_equal_blocks_compiled_one_by_one_are_one_graph(delivery: str) -> None:
    torch._dynamo.reset()
    model, counter = nn.Sequential(*(Block() for _ in range(12))), CompileCounter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if delivery == "at the step" else None
    handle = wrap_moe(model, optimizer)
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    loss = model(torch.randn(8, 16)).square().mean()
    (loss if optimizer else loss + handle.loss()).backward()
    assert counter.frame_count <= 2  # the first block's input needs no gradient
    assert all(block.router.weight.grad is not None for block in model)
