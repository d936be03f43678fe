"""Gates whose weight a quantiser has replaced by a tensor of its own kind, as torchao's `quantize_` does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import find_gates, wrap_moe

aten = torch.ops.aten


class Stored(Tensor):
    """Whole numbers and a scale a row under a floating-point dtype: it multiplies as a weight, and refuses all else."""

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor) -> Stored:
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        self.qdata, self.scale = qdata, scale

    @classmethod
    def of(cls, weight: Tensor) -> Stored:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["qdata", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Stored:
        return cls(inner["qdata"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.qdata * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return cls(args[0].qdata, args[0].scale)
        raise NotImplementedError(f"{func} on {cls.__name__}")


class Dequantising(Stored):
    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.qdata * self.scale


class Block(nn.Module):
    def __init__(self, kind: type[Stored] | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        if kind is not None:
            self.router.weight = nn.Parameter(kind.of(self.router.weight), requires_grad=False)
            self.router.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(p * e(x) for p, e in zip(self.router(x).softmax(-1).split(1, -1), self.experts, strict=True))


class Model(nn.Sequential):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x).square().mean()}


kinds = pytest.mark.parametrize("kind", [Stored, Dequantising])


@kinds
def test_a_quantised_gate_is_read_told_and_left_alone(kind: type[Stored]) -> None:
    torch.manual_seed(0)
    quantised = Block(kind)
    stored = quantised.router.weight
    model, x = Model(quantised, Block()), torch.randn(6, 16)
    handle = wrap_moe(model)
    with pytest.warns(UserWarning, match=r"quantised gates are read but left alone.*: 0\.router; keep them out of the quant"):
        model(x)["loss"].backward()
    torch.testing.assert_close(handle.gates[0].weight, stored.qdata * stored.scale)
    rows = handle.metrics()
    sigma = float(torch.linalg.matrix_norm(stored.qdata * stored.scale, 2))
    assert rows["0.router"]["sigma_max"] == pytest.approx(sigma)
    assert rows["0.router"]["loss"] == 0
    assert rows["1.router"]["loss"] > 0
    alone = Model(quantised, Block())
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k != "0.router.weight"}, strict=False)
    handle.remove()
    wanted = wrap_moe(alone[1], penalty_coef=handle.penalty_coef, add_to_loss=False)
    (alone(x)["loss"] + wanted.loss()).backward()  # the other gate's term, and nothing of the quantised one
    torch.testing.assert_close(model[1].router.weight.grad, alone[1].router.weight.grad)
    assert stored.grad is None
    assert quantised.router.weight is stored


@kinds
def test_only_quantised_gates_go_on(kind: type[Stored]) -> None:
    model = Model(Block(kind))
    handle = wrap_moe(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plain = Model(*model).forward(x := torch.randn(6, 16))["loss"].detach()
        loss = model(x)["loss"]
        loss.backward()
    torch.testing.assert_close(loss.detach(), plain)
    (message,) = [str(w.message) for w in told]
    assert "quantised" in message
    assert "frozen" not in message
    report = handle.report((x,), top_k=1)["0.router"]
    assert sum(report["load"]) == pytest.approx(1)


@kinds
def test_at_the_step_too(kind: type[Stored]) -> None:
    torch.manual_seed(1)
    model = Model(Block(kind), Block())
    before = model[1].router.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    wrap_moe(model, optimizer, balance=None, penalty_coef=1.0)
    with pytest.warns(UserWarning, match="quantised"):
        model(torch.randn(6, 16))
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model[1].router.weight, before)
    assert model[1].router.weight.grad.abs().sum() > 0


def test_the_trial_of_a_router_class_reads_a_quantised_one_as_any_other() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 4, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, indices = self.gate(x).sigmoid().topk(2, -1)
            return weights, indices

    block = Block()
    block.router = Router()
    (plain,) = find_gates(block)
    block.router.gate.weight = nn.Parameter(Dequantising.of(block.router.gate.weight), requires_grad=False)
    (gate,) = find_gates(block)
    assert repr(gate) == repr(plain)
    assert gate.scoring == "sigmoid"


def test_a_learning_tensor_of_another_kind_is_no_quantised_one() -> None:
    class Marked(Tensor):
        pass

    block = Block()
    block.router.weight = nn.Parameter(block.router.weight.detach().as_subclass(Marked))
    handle = wrap_moe(block)
    block(torch.randn(6, 16))
    handle.loss().backward()  # warns of nothing
    assert block.router.weight.grad.abs().sum() > 0
