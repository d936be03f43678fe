"""What goes wrong in silence elsewhere is said here: once, with the name; normal use is silent."""

import types
import warnings
from collections.abc import Callable

import pytest
import torch
from moe_models import BATCH, DIM, EXPERTS, Block, Regressor, Stack, mixtral, mixtral_gates, tokens
from torch import Tensor, nn

from spectral_router import RouterZLoss, wrap_moe
from spectral_router.functional import load_balance_loss, router_z_loss


def told(action: Callable[[], object]) -> list[str]:
    """The warnings that the package raises meanwhile, repeated ones included."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def train(model: nn.Module, steps: int = 3) -> None:
    for _ in range(steps):
        model(tokens(), torch.zeros(3, 5, DIM))["loss"].backward()


class Skipped(Block):
    """Does not use its gate."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[0](x)


def test_gate_that_does_not_run_in_the_first_training_forward() -> None:
    model = Regressor(Block(), Skipped())
    assert told(lambda: wrap_moe(model)) == []
    assert told(lambda: model.eval()(tokens())) == []
    model.train()
    (said,) = told(lambda: train(model))
    assert "layers.1.gate" in said
    assert "layers.0.gate" not in said
    assert "did not run in the first training forward" in said


def test_gate_that_does_not_run_is_penalised_all_the_same() -> None:
    model = Stack(Block(), Skipped())
    handle = wrap_moe(model, balance=None)
    with pytest.warns(UserWarning, match="did not run"):
        model(tokens())
    handle.loss().backward()
    assert all(layer.gate.weight.grad.norm() > 0 for layer in model.layers)


def test_frozen_gate_is_named_and_left_alone() -> None:
    model = Regressor()
    model.layers[1].gate.weight.requires_grad_(False)
    seen = []
    wrap_moe(model, penalty=lambda weights: seen.append(len(weights)) or sum(w.square().sum() for w in weights))
    (said,) = told(lambda: train(model))
    assert "frozen" in said
    assert "layers.1.gate" in said
    assert "layers.0.gate" not in said
    assert seen == [1, 1, 1]
    assert model.layers[1].gate.weight.grad is None


def test_model_with_frozen_gates_only_trains_without_a_term() -> None:
    model = Regressor()
    for layer in model.layers:
        layer.gate.weight.requires_grad_(False)
    handle = wrap_moe(model)
    assert len(told(lambda: train(model))) == 1
    with pytest.raises(RuntimeError, match="no term"):
        handle.loss()
    assert set(handle.metrics()) == {"layers.0.gate", "layers.1.gate"}


@pytest.mark.parametrize("schedule", ["frozen later", "thawed later"])
def test_gate_may_be_frozen_or_thawed_between_steps(schedule: str) -> None:
    model = Regressor()
    weight = model.layers[1].gate.weight.requires_grad_(schedule == "frozen later")
    wrap_moe(model)
    told(lambda: train(model))
    weight.requires_grad_(schedule == "thawed later")
    model.zero_grad()
    told(lambda: train(model, 1))
    assert (weight.grad is not None) is (schedule == "thawed later")


def z_and_even(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return router_z_loss(logits, mask) + load_balance_loss(logits.softmax(-1), mask)


z_and_even.reads = "logits"


@pytest.mark.parametrize("balance", ["default", z_and_even], ids=["default", "of logits"])
@pytest.mark.parametrize("where", ["config", "call"])
def test_the_model_s_own_balance_loss_is_on_too(balance: object, where: str) -> None:
    model = mixtral(output_router_logits=where == "config", router_aux_loss_coef=0.02)
    call = {"output_router_logits": True} if where == "call" else {}
    (said,) = told(lambda: (wrap_moe(model, balance=balance), model(**BATCH, **call)))
    assert "output_router_logits" in said
    assert "router_aux_loss_coef=0.02" in said


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"balance": None}, {"output_router_logits": True, "router_aux_loss_coef": 0.02}),
        ({"balance": RouterZLoss()}, {"output_router_logits": True, "router_aux_loss_coef": 0.02}),
        ({"balance": router_z_loss}, {"output_router_logits": True, "router_aux_loss_coef": 0.02}),
        ({}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}),
        ({}, {"output_router_logits": False, "router_aux_loss_coef": 0.02}),
    ],
    ids=["no balance here", "z-loss", "z-loss function", "coefficient 0", "off"],
)
def test_one_balance_loss_is_no_reason_to_warn(options: dict[str, object], config: dict[str, object]) -> None:
    model = mixtral(**config)
    assert told(lambda: (wrap_moe(model, **options), model(**BATCH, output_router_logits=config["output_router_logits"]))) == []


@pytest.mark.parametrize(
    "config", [{"depth": 2}, (2,), "tiny", None, types.MappingProxyType({}), types.SimpleNamespace(depth=2)]
)
def test_config_of_any_kind(config: object) -> None:
    model = Regressor()
    model.config = config
    wrap_moe(model)
    train(model)


def test_term_that_nobody_takes() -> None:
    model = Stack()
    wrap_moe(model)
    assert told(lambda: model(tokens())) == []  # it may be taken yet
    (said,) = told(lambda: [model(tokens()) for _ in range(3)])
    assert "not used" in said
    assert "handle.loss()" in said


def test_loss_that_sees_no_backward() -> None:
    model = mixtral()
    wrap_moe(model)
    (said,) = told(lambda: [model(**BATCH).logits.mean().backward() for _ in range(30)])
    assert "no backward" in said
    assert "add_to_loss=False" in said


def test_loss_that_sees_a_backward_now_and_then() -> None:
    model = mixtral()
    wrap_moe(model)

    def accumulate() -> None:
        for index in range(30):
            loss = model(**BATCH).loss
            if index % 6 == 0:
                loss.backward()

    assert told(accumulate) == []


@pytest.mark.parametrize("how", ["torch.compile(model)", "the model in it", "model.compile()", "a part"])
def test_model_compiled_before(how: str) -> None:
    model = mixtral()
    if how == "model.compile()":
        model.compile(backend="eager")
    elif how == "a part":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    elif how == "the model in it":
        model = nn.Sequential(torch.compile(model, backend="eager"))
    compiled = torch.compile(model, backend="eager") if how == "torch.compile(model)" else model
    (said,) = told(lambda: wrap_moe(compiled))
    assert "compiled before wrap_moe" in said
    assert {"a part": "model.layers.0", "the model in it": ": 0"}.get(how, "MixtralForCausalLM") in said


class Quantised(nn.Module):
    """As quantisers leave a linear layer: whole numbers and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, (EXPERTS, DIM), dtype=torch.int8), requires_grad=False)
        self.scale = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).mT


def quantised_block() -> Block:
    block = Block()
    block.gate = Quantised()
    return block


def test_quantised_gate_is_named_and_skipped() -> None:
    model = Regressor(Block(), quantised_block())
    handles = []
    (said,) = told(lambda: handles.append(wrap_moe(model)))
    assert "quantised" in said
    assert "layers.1.gate" in said
    assert "layers.0.gate" not in said
    assert [gate.name for gate in handles[0].gates] == ["layers.0.gate"]
    assert told(lambda: train(model)) == []


@pytest.mark.filterwarnings("ignore:wrap_moe skips quantised gates")
def test_quantised_gates_only_is_an_error() -> None:
    with pytest.raises(ValueError, match="no router gate found"):
        wrap_moe(Regressor(quantised_block()))


def test_gate_outside_of_a_call_of_the_wrapped_model() -> None:
    model = Regressor()
    handle = wrap_moe(model)
    (said,) = told(lambda: [model.layers[1](tokens()) for _ in range(3)])
    assert "'layers.1.gate'" in said
    assert "outside a call of the wrapped Regressor" in said
    assert "sigma_max" in handle.metrics()["layers.1.gate"]
    assert told(lambda: train(model)) == []


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("taken", [False, True], ids=["in the loss", "handle.loss()"])
def test_normal_use_is_silent(reentrant: bool | None, taken: bool) -> None:
    model = mixtral(use_cache=False)
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    def use() -> None:
        handle = wrap_moe(model, add_to_loss=not taken)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(5):
            loss = model(**BATCH).loss
            (loss + handle.loss() if taken else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.metrics()
            if step % 2:
                model.eval()(**BATCH)
                model.train()
        handle.remove()
        model(**BATCH).loss.backward()

    assert told(use) == []
    assert all(gate.weight.grad is not None for gate in mixtral_gates(model))
