"""The gradient of a wrapped model is that of task + penalty + balance written out by hand."""

import functools
import itertools
import shutil
from contextlib import nullcontext

import pytest
import torch
from inductor import QUICK_INDUCTOR
from moe_models import (
    BALANCE,
    BATCH,
    DIM,
    IDS,
    MASK,
    PENALTY,
    Block,
    IndexBlock,
    Regressor,
    Stack,
    assert_same_gradients,
    gradients,
    mixtral,
    mixtral_gates,
    objective,
    primed,
    tokens,
    wrapped_stack,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectral_router import wrap_moe
from spectral_router.functional import load_balance_loss

SCALE = 1024.0
PRECISIONS = ["float32", "bf16", "scaler"]
MODES = {"none": None, "non-reentrant": False, "reentrant": True}
CHECKPOINTING = pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)

# raised inside torch while it traces, and not shown outside of tests
QUIET = pytest.mark.filterwarnings(
    r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning:torch",
    r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning:torch",
    r"ignore:.*should not be instantiated:DeprecationWarning",  # torch 2.9, of every function that it traces
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def precision_of(name: str):
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()


def micro_batches(count: int):
    return (dict(zip(BATCH, rows, strict=True)) for rows in zip(*(t.chunk(count) for t in BATCH.values()), strict=True))


def equal_batches(count: int):
    """Of one shape whatever their number, so that one graph serves them; the first is `BATCH`."""
    for i in range(count):
        ids, mask = (IDS - 3 + 31 * i) % 87 + 3, MASK.roll(i, 0)
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@functools.cache
def by_hand(
    count: int,
    precision: str,
    penalty_coef: float = PENALTY,
    balance_coef: float = BALANCE,
    layers: int = 2,
    batches=micro_batches,
):
    """Gradients and losses of a step of the model as it is, the objective spelled out."""
    model, losses = mixtral(num_hidden_layers=layers), []
    weights = [gate.weight for gate in mixtral_gates(model)]
    penalty, scale = primed(weights), SCALE if precision == "scaler" else 1.0
    for batch in batches(count):
        with precision_of(precision):
            output = model(**batch, output_router_logits=True)
        mask = batch["attention_mask"].flatten()
        balance = sum(load_balance_loss(logits.float().softmax(-1), mask) for logits in output.router_logits)
        loss = output.loss + penalty_coef * penalty(weights) + balance_coef * balance
        (loss / count * scale).backward()
        losses.append(loss.item())
    return gradients(model, scale), losses


def checkpointed(reentrant: bool | None, layers: int = 2):
    model = mixtral(use_cache=False, num_hidden_layers=layers)
    if reentrant is not None:
        # transformers before 5.23 knows the older name only
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def wrapped(model, **options):
    penalty = primed([gate.weight for gate in mixtral_gates(model)])
    return wrap_moe(model, penalty=penalty, penalty_coef=PENALTY, balance_coef=BALANCE, **options)


def step(model, forward, count: int, precision: str, batches=micro_batches):
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "scaler"), []
    for batch in batches(count):
        with precision_of(precision):
            loss = forward(**batch).loss
        scaler.scale(loss / count).backward()
        losses.append(loss.item())
    return gradients(model, SCALE if precision == "scaler" else 1.0), losses


def graphs_made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------------------------------------ the matrix


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 4])
@CHECKPOINTING
def test_gradients_and_loss_are_those_by_hand(reentrant: bool | None, count: int, precision: str) -> None:
    model = checkpointed(reentrant)
    wrapped(model)
    found, losses = step(model, model, count, precision)
    expected, expected_losses = by_hand(count, precision)
    assert_same_gradients(found, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


@QUIET
@CHECKPOINTING
def test_gradients_and_loss_are_those_by_hand_when_compiled(reentrant: bool | None) -> None:
    model = checkpointed(reentrant, layers=1)  # a graph's time is its layers'
    wrapped(model)
    forward = torch.compile(model, backend="aot_eager", fullgraph=reentrant is None)
    for precision, count in itertools.product(PRECISIONS, (1, 4)):
        known = graphs_made()
        model.zero_grad()
        found, losses = step(model, forward, count, precision, equal_batches)
        if precision == "scaler":  # its graph is that of float32
            assert graphs_made() == known > 0
        elif count == 1:  # autocast makes another
            assert graphs_made() > known
        expected, expected_losses = by_hand(count, precision, layers=1, batches=equal_batches)
        assert_same_gradients(found, expected)
        assert losses == pytest.approx(expected_losses, rel=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("left_out", [(0.0, BALANCE), (PENALTY, 0.0)], ids=["penalty", "balance"])
def test_each_part_is_a_visible_share_of_the_gate_gradient(left_out: tuple[float, float], precision: str) -> None:
    full, rest = by_hand(1, precision)[0], by_hand(1, precision, *left_out)[0]
    gates = [name for name in full if "gate.weight" in name]
    assert len(gates) == 2
    for name in gates:
        assert (full[name] - rest[name]).norm() > 1e-2 * full[name].norm()


@QUIET
@QUICK_INDUCTOR
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_with_inductor() -> None:
    model = checkpointed(None, layers=1)
    wrapped(model)
    found, losses = step(model, torch.compile(model, fullgraph=True), 1, "float32")
    expected, expected_losses = by_hand(1, "float32", layers=1)
    assert_same_gradients(found, expected)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


@QUIET
def test_hooks_are_traced_and_compiled_once_and_stop_where_they_are_removed() -> None:
    def balance(probs: Tensor, mask: Tensor) -> Tensor:
        assert torch.compiler.is_compiling()
        return load_balance_loss(probs, mask)

    def probs(_module: nn.Module, _args: tuple, _kwargs: dict, output: tuple[Tensor, ...]) -> Tensor:
        assert torch.compiler.is_compiling()
        return output[0].float().softmax(-1)

    model = checkpointed(None)
    plain = model(**BATCH).loss
    handle = wrapped(model, balance=balance)
    for gate in handle.gates:
        gate.probs = probs
    forward, graphs = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for _ in range(4):
        loss = forward(**BATCH).loss
        assert not torch.allclose(loss, plain, rtol=1e-5)
        loss.backward()
        graphs.append(graphs_made())
    assert len(set(graphs)) == 1
    handle.remove()
    torch.testing.assert_close(forward(**BATCH).loss, plain, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------- models written by hand


@CHECKPOINTING
def test_checkpoint_by_hand_in_a_model_that_returns_a_loss(reentrant: bool | None) -> None:
    model, twin, _ = wrapped_stack(Regressor, reentrant=reentrant)
    x, target = tokens(), torch.randn(3, 5, DIM)
    loss = model(x, target)["loss"]
    loss.backward()
    output, term = objective(twin, x)
    expected = (output - target).square().mean() + term
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model), gradients(twin))


@CHECKPOINTING
def test_loss_of_the_handle_for_a_model_that_returns_a_tensor(reentrant: bool | None) -> None:
    model, twin, handle = wrapped_stack(reentrant=reentrant)
    x = tokens()
    (model(x).square().mean() + handle.loss()).backward()
    output, term = objective(twin, x)
    (output.square().mean() + term).backward()
    assert_same_gradients(gradients(model), gradients(twin))


@CHECKPOINTING
def test_loss_of_the_handle_for_a_mixtral_called_without_labels(reentrant: bool | None) -> None:
    model = checkpointed(reentrant)
    handle = wrapped(model)
    output = model(input_ids=BATCH["input_ids"], attention_mask=MASK)
    assert output.loss is None
    labels = BATCH["labels"][:, 1:].flatten()
    (cross_entropy(output.logits[:, :-1].flatten(0, 1), labels) + handle.loss()).backward()
    assert_same_gradients(gradients(model), by_hand(1, "float32")[0])


@CHECKPOINTING
@pytest.mark.parametrize("order", ["together", "first first", "last first"])
@pytest.mark.parametrize("same", [False, True], ids=["other batch", "same batch"])
def test_two_forwards_before_backward(reentrant: bool | None, order: str, same: bool) -> None:
    model, twin, _ = wrapped_stack(Regressor, reentrant=reentrant)
    x, target = tokens(), torch.randn(3, 5, DIM)
    batches = [(x, 1.0), (x if same else tokens(), 2.0)]
    losses = [model(x, target)["loss"] * weight for x, weight in batches]
    if order == "together":
        sum(losses).backward()
    else:
        for loss in losses if order == "first first" else losses[::-1]:
            loss.backward()
    for x, weight in batches:
        output, term = objective(twin, x)
        (weight * ((output - target).square().mean() + term)).backward()
    assert_same_gradients(gradients(model), gradients(twin))


@CHECKPOINTING
def test_layer_that_runs_twice_is_penalised_once_and_balanced_twice(reentrant: bool | None) -> None:
    block = Block()
    model, twin, handle = wrapped_stack(Stack, block, block, reentrant=reentrant)
    assert len(handle.gates) == 1
    x = tokens()
    (model(x).square().mean() + handle.loss()).backward()
    found = gradients(model)
    model.zero_grad()
    handle.remove()
    output, term = objective(twin, x)
    (output.square().mean() + term).backward()
    assert_same_gradients(found, gradients(twin))


@CHECKPOINTING
def test_tied_gates_are_penalised_once_and_balanced_each(reentrant: bool | None) -> None:
    model, twin, handle = wrapped_stack(reentrant=reentrant)
    handle.remove()
    for each in (model, twin):
        each.layers[1].gate.weight = each.layers[0].gate.weight
    penalty = primed([model.layers[0].gate.weight])
    handle = wrap_moe(model, penalty=penalty, penalty_coef=PENALTY, balance_coef=BALANCE)
    assert len(handle.gates) == 2
    x = tokens()
    (model(x).square().mean() + handle.loss()).backward()
    output, term = objective(twin, x)
    (output.square().mean() + term).backward()
    assert_same_gradients(gradients(model), gradients(twin))


def test_items_in_batch_weigh_the_term_by_tokens() -> None:
    batches, counts = list(micro_batches(4)), []
    for batch, ignored in zip(batches, (0, 6, 2, 7), strict=True):
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :ignored] = -100
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))  # the first label of a row is no target
    total = sum(counts)
    assert len(set(counts)) == 4
    model, twin = mixtral(), mixtral()
    wrapped(model)
    for batch in batches:
        model(**batch, num_items_in_batch=torch.tensor(total)).loss.backward()
    weights = [gate.weight for gate in mixtral_gates(twin)]
    penalty = primed(weights)
    for batch, count in zip(batches, counts, strict=True):
        output = twin(**batch, output_router_logits=True)
        mask = batch["attention_mask"].flatten()
        balance = sum(load_balance_loss(logits.softmax(-1), mask) for logits in output.router_logits)
        (count / total * (output.loss + PENALTY * penalty(weights) + BALANCE * balance)).backward()
    assert_same_gradients(gradients(model), gradients(twin))


@pytest.mark.parametrize("reentrant", [None, False])
def test_gate_that_returns_indices_learns_from_the_term(reentrant: bool | None) -> None:
    block = IndexBlock()
    model = Stack(block, reentrant=reentrant)
    handle, x = wrap_moe(model, penalty=None, balance_coef=BALANCE), tokens()
    assert [gate.how for gate in handle.gates] == ["W x + b of its input"]
    (model(x).square().mean() + handle.loss()).backward()
    (expected,) = torch.autograd.grad(BALANCE * load_balance_loss((x @ block.gate.weight.mT).softmax(-1)), block.gate.weight)
    assert_same_gradients({"gate": block.gate.weight.grad}, {"gate": expected})


def test_gate_that_returns_indices_is_refused_under_reentrant_checkpointing() -> None:
    model = Stack(IndexBlock(), reentrant=True)
    handle = wrap_moe(model)
    loss = model(tokens()).square().mean() + handle.loss()
    with pytest.raises(RuntimeError, match=r"'layers\.0\.gate' hands out nothing differentiable.*use_reentrant=False"):
        loss.backward()
