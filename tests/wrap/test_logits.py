"""wrap_moe with a balance loss that reads logits: its gradient, its measurements, and the gates that have none."""

import math

import pytest
import torch
from moe_models import (
    BATCH,
    DIM,
    EXPERTS,
    Block,
    Regressor,
    Stack,
    assert_same_gradients,
    gradients,
    mixtral,
    tokens,
)
from operations import Operations
from test_delivery import CHECKPOINTING, MODES, QUIET, checkpointed, precision_of
from torch import Tensor, nn

from spectral_router import Gate, find_gates, wrap_moe
from spectral_router.balance.losses import RouterZLoss
from spectral_router.functional import load_balance_loss, router_z_loss

BETA = 0.3


def both(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    return load_balance_loss(logits.softmax(-1), mask) + 0.1 * router_z_loss(logits, mask)


both.reads = "logits"

LOSSES = pytest.mark.parametrize("balance", [RouterZLoss(), both], ids=["z", "z and CV²"])


def wrapped(model: nn.Module, balance=None, **options):
    return wrap_moe(model, penalty=None, balance=balance or RouterZLoss(), balance_coef=BETA, **options)


def objective(model: Stack, x: Tensor, balance) -> tuple[Tensor, Tensor]:
    """Output of a stack without checkpointing, and its term written out by hand."""
    term = torch.zeros(())
    for layer in model.layers:
        term = term + BETA * balance(layer.gate(x).float())
        x = layer(x)
    return x, term


class ChangedLater(Block):
    """Its caller changes what the gate gave out."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).mul_(2.0).softmax(-1).split(1, -1)
        return x + sum(share * expert(x).tanh() for share, expert in zip(shares, self.experts, strict=True))


# ------------------------------------------------------------------------------------------------------------- gradient


@QUIET
@LOSSES
@CHECKPOINTING
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_is_the_sum_by_hand(balance, reentrant: bool | None, compiled: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, twin = Stack(reentrant=reentrant), Stack()
    twin.load_state_dict(model.state_dict())
    handle = wrapped(model, balance)
    forward = torch.compile(model, backend="aot_eager", fullgraph=reentrant is None) if compiled else model
    for _ in range(2):  # gradients accumulate
        x = tokens()
        (forward(x).square().mean() + handle.loss()).backward()
        output, term = objective(twin, x, balance)
        (output.square().mean() + term).backward()
    assert_same_gradients(gradients(model), gradients(twin))
    torch.compiler.reset()


@QUIET
@CHECKPOINTING
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradient_of_mixtral_with_padding(reentrant: bool | None, precision: str) -> None:
    model, twin = checkpointed(reentrant), mixtral(use_cache=False)
    handle = wrapped(model)
    with precision_of(precision):
        output, plain = model(**BATCH), twin(**BATCH, output_router_logits=True)
    mask = BATCH["attention_mask"].flatten()
    parts = [BETA * router_z_loss(logits, mask) for logits in plain.router_logits]
    plain = plain.loss + sum(parts)
    output.loss.backward()
    plain.backward()
    close = 1e-5 if precision == "float32" else 2e-2
    assert output.loss.item() == pytest.approx(plain.item(), rel=close)
    assert_same_gradients(gradients(model), gradients(twin), close)
    assert [row["loss"] for row in handle.metrics().values()] == pytest.approx([part.item() for part in parts], rel=close)


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_what_the_caller_makes_of_the_logits_is_what_routes(reentrant: bool | None) -> None:
    model, twin = Stack(ChangedLater(), reentrant=reentrant), Stack(Block())
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in twin.layers[0].gate.parameters():
            parameter.mul_(2)
    handle, x = wrapped(model), tokens()
    for _ in range(2):  # the first forward is watched, and shows it
        model(x)
        found = handle.loss()
    _, term = objective(twin, x, RouterZLoss())
    torch.testing.assert_close(found.detach(), term.detach())


def test_logits_computed_from_the_input_of_a_gate() -> None:
    model, x = Stack(), tokens()
    expected = objective(model, x, RouterZLoss())[1].detach()
    gates = find_gates(model)
    for gate in gates:
        gate.reads = "input"
    handle = wrapped(model, gates=gates)
    model(x)
    torch.testing.assert_close(handle.loss().detach(), expected)


@pytest.mark.parametrize("reads", ["logits", "input"])
def test_only_what_the_caller_may_change_is_copied(reads: str) -> None:
    gate = find_gates(Stack())[0]
    gate.reads, x = reads, tokens()
    output = gate.module(x)
    with Operations() as operations:
        logits = gate.read((x,), {}, output, logits=True)
    assert torch.equal(logits, output)
    copies = operations.count["_to_copy"] + operations.count["clone"]
    assert copies == (reads == "logits")


# --------------------------------------------------------------------------------------------------- which loss, and when


@pytest.mark.parametrize("balance", [router_z_loss, RouterZLoss()], ids=["function", "module"])
@pytest.mark.parametrize("later", [False, True], ids=["at wrapping", "set later"])
def test_the_loss_says_what_it_reads(balance, later: bool) -> None:
    model, x = Stack(), tokens()
    expected = objective(model, x, router_z_loss)[1].detach()
    share = model.layers[0].gate(x).softmax(-1)
    handle = wrapped(model, load_balance_loss if later else balance)
    if later:
        model(x)
        handle.loss()
        handle.balance = balance
    model(x)
    torch.testing.assert_close(handle.loss().detach(), expected)
    assert handle.metrics()["layers.0.gate"]["balance"] == pytest.approx(load_balance_loss(share).item(), rel=1e-5)


def test_a_loss_set_later_is_refused_as_at_wrapping() -> None:
    handle = wrap_moe(Regressor(Block(), SoftmaxedBlock()))
    before = handle.balance
    with pytest.raises(ValueError, match=r"no logit for each expert can be read: layers\.1\.gate"):
        handle.balance = router_z_loss
    assert handle.balance is before


# -------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_metrics_are_of_the_probabilities(scoring: str) -> None:
    model, x = Stack(), tokens()
    gates = find_gates(model)
    for gate in gates:
        gate.scoring = scoring
    rows = []
    for balance in (RouterZLoss(), lambda probs, mask: probs.sum()):
        with wrapped(model, balance, gates=gates) as handle:
            handle.observed.done.add(0)  # the model's own scoring is softmax, and its forward would say so
            model(x)
            rows.append(handle.metrics())
    logits = model.layers[0].gate(x).detach()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    share = scores.mean((0, 1))
    for row, same in zip(rows[0].values(), rows[1].values(), strict=True):
        assert {**row, "loss": 0} == pytest.approx({**same, "loss": 0}, rel=1e-5, nan_ok=True)
    first = rows[0]["layers.0.gate"]
    assert first["max_share"] == pytest.approx(share.max().item(), rel=1e-5)
    assert first["entropy"] == pytest.approx(-share.xlogy(share).sum().item() / math.log(EXPERTS), rel=1e-5)
    assert first["loss"] == pytest.approx(BETA * router_z_loss(logits).item(), rel=1e-5)


def test_frozen_gates_are_left_alone() -> None:
    model, x = Stack(), tokens()
    model.layers[0].gate.requires_grad_(False)
    expected = BETA * router_z_loss(model.layers[1].gate(model.layers[0](x)))
    handle = wrapped(model)
    with pytest.warns(UserWarning, match=r"frozen gates.*layers\.0\.gate"):
        model(x)
    torch.testing.assert_close(handle.loss().detach(), expected.detach())


# ------------------------------------------------------------------------------------------------------------- messages


class Softmaxed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * super().forward(x)).softmax(-1)  # so they are not those of W x


class SoftmaxedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Softmaxed(DIM, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(share * expert(x) for share, expert in zip(self.gate(x).split(1, -1), self.experts, strict=True))


def test_message_a_gate_without_logits() -> None:
    model = Regressor(Block(), SoftmaxedBlock())
    message = (
        r'the balance loss reads logits \(reads="logits"\), but of these gates no logit for each expert can be read: '
        r"layers\.1\.gate \(output: probs\); leave them out with exclude=\['layers\.1\.gate'\], or take a balance loss that "
        "reads probabilities"
    )
    with pytest.raises(ValueError, match=message):
        wrapped(model)
    wrapped(model, exclude=["layers.1.gate"]).remove()  # and the refusal left nothing behind
    wrap_moe(model).remove()


def test_message_a_gate_with_its_own_function() -> None:
    model = Stack()
    gates = find_gates(model)
    own = Gate("mine", gates[0].module, EXPERTS, probs=lambda module, args, kwargs, output: output.softmax(-1))
    with pytest.raises(ValueError, match=r"no logit .* can be read: mine \(own function\); leave .* exclude=\['mine'\]"):
        wrapped(model, gates=[own, gates[1]])
    gates[1].scoring = "product_keys"
    with pytest.raises(ValueError, match=r"no logit .* can be read: layers\.1\.gate"):
        wrapped(model, gates=gates)


def test_message_reads() -> None:
    def balance(values: Tensor, mask: Tensor | None) -> Tensor:
        return values.sum()

    balance.reads = "logit"
    message = 'the attribute reads of a balance loss must be "probs" or "logits", got reads=\'logit\''
    with pytest.raises(ValueError, match=message):
        wrap_moe(Stack(), balance=balance)


def test_it_learns_small_logits() -> None:
    model, x = Stack(Block()), tokens(64)
    before = router_z_loss(model.layers[0].gate(x))
    handle = wrapped(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        model(x)
        handle.loss().backward()
        optimizer.step()
    handle.remove()
    assert router_z_loss(model.layers[0].gate(x)) < 0.9 * before
