"""A wrapped model is the model it was: same outputs, same state, nothing kept, and everything taken back."""

import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from moe_models import BATCH, DIM, EXPERTS, Regressor, Stack, gradients, mixtral, mixtral_gates, tokens
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectral_router import MoEHandle, wrap_moe

HOOKS = sorted(name for name in vars(nn.Module()) if "hooks" in name)


def hooks_of(model: nn.Module) -> dict[tuple[str, str], dict[int, object]]:
    return {(path, kind): dict(getattr(module, kind)) for path, module in model.named_modules() for kind in HOOKS}


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def tensors_since(known: list[Tensor]) -> list[Tensor]:
    """Those alive that were not before: other tests leave some, which may go at any time."""
    before = {id(tensor) for tensor in known}
    return [tensor for tensor in tensors_alive() if id(tensor) not in before]


# ---------------------------------------------------------------------------------------------------------- untouched


@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_the_same_bit_for_bit(training: bool) -> None:
    model = mixtral(attention_dropout=0.2).train(training)
    torch.manual_seed(3)
    before = model(**BATCH)
    with wrap_moe(model):
        torch.manual_seed(3)
        after = model(**BATCH)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss) is not training  # in training the term is in it


class NoisyRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.weight.mT
        return logits + torch.randn_like(logits)


def test_wrapping_draws_no_random_number_and_changes_no_state() -> None:
    model = Stack()
    model.layers[0].gate = NoisyRouter()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    wrap_moe(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_class_state_dict_parameters_and_modules_stay() -> None:
    model = mixtral()
    names = [list(model.state_dict()), *(dict(f()) for f in (model.named_parameters, model.named_buffers, model.named_modules))]
    attributes = [sorted(vars(module)) for module in model.modules()]
    wrap_moe(model)
    model(**BATCH).loss.backward()
    assert type(model).__name__ == "MixtralForCausalLM"
    assert names == [
        list(model.state_dict()),
        *(dict(f()) for f in (model.named_parameters, model.named_buffers, model.named_modules)),
    ]
    assert attributes == [sorted(vars(module)) for module in model.modules()]


# -------------------------------------------------------------------------------------------------------- nothing kept


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "eval and no_grad"])
def test_nothing_is_recorded_outside_of_training(how: str) -> None:
    def forbidden(*_: object) -> Tensor:
        raise AssertionError("called")

    model = mixtral()
    handle = wrap_moe(model, penalty=forbidden, balance=forbidden)
    for gate in handle.gates:
        gate.probs = forbidden
    model.train("eval" not in how)
    with torch.inference_mode("inference" in how), torch.no_grad() if "grad" in how else nullcontext():
        model(**BATCH)
    assert handle.loss() == 0  # so that a loop may share its loss function between training and evaluation
    with pytest.raises(AssertionError, match="called"):  # so that it can fail
        model.train()(**BATCH)


def test_generate_keeps_no_tensor() -> None:
    model = mixtral()
    wrap_moe(model)
    model.generation_config.use_cache = True

    def generate(length: int) -> None:
        model.generate(BATCH["input_ids"][1:2], max_new_tokens=length, do_sample=False, eos_token_id=None)

    generate(2)
    before = tensors_alive()
    generate(200)
    assert not tensors_since(before)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("taken", [False, True], ids=["in the loss", "handle.loss()"])
def test_no_tensor_of_a_step_outlives_backward(reentrant: bool | None, taken: bool) -> None:
    before = tensors_alive()
    model = Stack(reentrant=reentrant) if taken else Regressor(reentrant=reentrant)
    handle, x, target = wrap_moe(model), tokens(), torch.randn(3, 5, 16)

    def step() -> None:
        (model(x).square().mean() + handle.loss() if taken else model(x, target)["loss"]).backward()

    step()
    step()
    assert not [tensor for tensor in tensors_since(before) if tensor.grad_fn is not None]
    count = len(tensors_since(before))
    step()
    assert len(tensors_since(before)) == count


# ------------------------------------------------------------------------------------------------------------- copies


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)


@COPIES
@pytest.mark.parametrize("moment", ["at once", "before backward", "after backward"])
def test_a_copy_is_wrapped_with_a_handle_of_its_own(copied: Callable[[nn.Module], nn.Module], moment: str) -> None:
    model = mixtral()
    handle = wrap_moe(model, add_to_loss=False)  # the term waits in the handle
    loss = model(**BATCH).loss if moment != "at once" else None
    if moment == "after backward":
        loss.backward()
    twin = copied(model)
    own = MoEHandle.of(twin)
    assert own.model is twin
    assert [gate.module for gate in own.gates] == mixtral_gates(twin)
    assert not set(map(id, (handle, handle.penalty, *model.modules()))) & set(map(id, (own, own.penalty, *twin.modules())))
    own.remove()
    assert MoEHandle.of(twin) is None
    assert MoEHandle.of(model) is handle


@COPIES
def test_training_a_copy_is_training_the_model_and_leaves_its_handle_alone(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = mixtral()
    handle = wrap_moe(model, penalty="hold", balance_coef=1.0)  # under which no metric is NaN
    model(**BATCH)  # the graph of this step is not copied
    twin, before = copied(model), handle.metrics()
    twin(**BATCH).loss.backward()
    found = gradients(twin)
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert handle.metrics() == before
    assert MoEHandle.of(twin).metrics() != before
    model(**BATCH).loss.backward()
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients(model).items())


def test_a_copied_gate_reports_to_the_same_handle() -> None:
    model = mixtral()
    handle = wrap_moe(model)
    layer = model.model.layers[0].mlp
    layer.gate = copy.deepcopy(layer.gate)  # as adapter libraries do
    assert MoEHandle.of(layer.gate) is handle
    model(**BATCH).loss.backward()
    assert handle.gates[0].module is layer.gate
    assert layer.gate.weight.grad.norm() > 0


HOOKS_AFTER_LOADING = """
import sys, torch
from spectral_router import MoEHandle
model = torch.load(sys.argv[1], weights_only=False)
for module in model.modules():
    for _ in range(4):
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_hook(lambda *_: None)
model(torch.randn(8, 16))
MoEHandle.of(model).loss().backward()
"""


@pytest.mark.slow
def test_hooks_registered_after_loading_in_a_new_process_do_not_take_the_place_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a process that has registered none
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    wrap_moe(model, gates="1")
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", HOOKS_AFTER_LOADING, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


# ------------------------------------------------------------------------------------------------------------- removal


def crash(*_: object) -> None:
    raise KeyError("crash")


@pytest.mark.parametrize("end", ["remove", "twice", "with", "with and an exception", "after an exception in forward"])
def test_removal_restores_every_hook(end: str) -> None:
    model = mixtral()
    users = [model.register_forward_hook(lambda *_: None), mixtral_gates(model)[0].register_forward_hook(lambda *_: None)]
    before = hooks_of(model)
    handle = wrap_moe(model)
    assert hooks_of(model) != before
    assert MoEHandle.of(model) is handle
    if end == "with":
        with handle:
            model(**BATCH)
    elif end == "with and an exception":
        with pytest.raises(KeyError), handle:
            raise KeyError
    elif end == "after an exception in forward":
        crashing = model.lm_head.register_forward_hook(crash)
        with pytest.raises(KeyError, match="crash"), handle:
            model(**BATCH)
        crashing.remove()
    else:
        handle.remove()
        if end == "twice":
            handle.remove()
    assert hooks_of(model) == before
    assert MoEHandle.of(model) is None
    for user in users:
        user.remove()
    assert not any(hooks_of(model).values())


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_a_step_after_an_exception_in_forward_is_as_without_it(reentrant: bool | None) -> None:
    found, before = [], tensors_alive()
    for exception in (False, True):
        torch.manual_seed(0)
        model = Regressor(reentrant=reentrant)
        wrap_moe(model, balance_coef=1.0)
        x, target = tokens(), torch.randn(3, 5, 16)
        if exception:
            hook = model.layers[1].experts[3].register_forward_hook(crash)
            with pytest.raises(KeyError, match="crash"):
                model(x, target)
            hook.remove()
            assert not [tensor for tensor in tensors_since(before) if tensor.grad_fn is not None]
        model(x, target)["loss"].backward()
        found.append(gradients(model))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("again", ["the model", "a part of it", "what holds it"])
def test_wrapping_twice_is_an_error(again: str) -> None:
    model = Regressor()
    wrap_moe(model)
    target = {"the model": model, "a part of it": model.layers[0], "what holds it": nn.Sequential(model)}[again]
    with pytest.raises(ValueError, match=r"wrapped already; .*remove"):
        wrap_moe(target)
    MoEHandle.of(model).remove()
    wrap_moe(target).remove()
