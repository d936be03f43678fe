"""The guard at the optimizer's step, and other ways for a term to be lost or misplaced without a word."""

import warnings

import pytest
import torch
from test_at_step import ALPHA, SIGMA, Block, Wide, batches, wrapped
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, SpectralRankPenalty, wrap_moe
from spectral_router.functional import spectral_rank_penalty

# dynamo's own, about tensors it looks at
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def test_a_term_without_a_backward_is_told_at_the_first_step() -> None:
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model)
    model(batches(1)[0][0])["y"].mean().backward()
    with pytest.warns(UserWarning, match=r"gates of Wide, but .* term of its 1 training forward\(s\).*Deliver at the step"):
        optimizer.step()
    model(batches(1)[0][0])["y"].mean().backward()
    optimizer.step()  # once


@pytest.mark.parametrize("deliver", ["loss", "taken", "step", "removed"])
def test_where_it_arrives_nothing_is_said(deliver: str) -> None:
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wrapped(model, optimizer if deliver == "step" else None, add_to_loss=deliver != "taken")
    if deliver == "removed":
        handle.remove()
    for _ in range(3):
        output = model(batches(1)[0][0])
        loss = output["y"].mean() if deliver in ("step", "removed") else output["loss"]
        (loss + handle.loss() if deliver == "taken" else loss).backward()
        optimizer.step()


def test_optimizers_of_something_else_are_no_concern() -> None:
    model, head = Wide(), nn.Linear(6, 1).double()
    wrapped(model)
    output = model(batches(1)[0][0])
    head(output["y"].detach()).mean().backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    output["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_backbone_called_past_the_wrapped_model_is_told() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Wide()

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)["y"]

    model = Outer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that of the gate itself
        model.backbone(batches(1)[0][0])["y"].mean().backward()
    with pytest.warns(UserWarning, match="no training forward has run the hooks of wrap_moe"):
        optimizer.step()


def test_compiled_code_is_followed_too() -> None:
    torch.compiler.reset()
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(model, penalty=SpectralRankPenalty(SIGMA, solver="exact"))  # few operations, so a small graph
    call = torch.compile(model, backend="aot_eager")
    call(batches(1)[0][0])["loss"].backward()
    optimizer.step()
    call(batches(1)[0][0])["y"].mean().backward()
    with pytest.warns(UserWarning, match="Deliver at the step"):
        optimizer.step()


def test_one_penalty_that_remembers_belongs_to_one_model() -> None:
    penalty = SpectralRankPenalty("initial")
    wrap_moe(Wide(), penalty=penalty)
    with pytest.raises(ValueError, match="the SpectralRankPenalty belongs to another model"):
        wrap_moe(Wide(), penalty=penalty)


def test_a_gate_bypassed_by_a_kernel_is_penalised_and_balanced_all_the_same() -> None:
    class Fused(Block):
        def run(self, x: Tensor) -> Tensor:
            probs = nn.functional.linear(x, self.router.weight, self.router.bias).softmax(-1)
            return sum(p * expert(x).tanh() for p, expert in zip(probs.split(1, -1), self.experts, strict=True))

    model = Wide()
    model.blocks = nn.ModuleList(Fused("none", True).double() for _ in range(2))
    handle = wrapped(model, balance=LoadBalanceLoss())
    term = model(batches(1)[0][0])["loss"]
    assert [balance is not None for balance in handle.balances] == [True, True]  # read where the block makes its logits
    balance = handle.balance_coef * sum(handle.balances)
    handle.remove()
    task = model(batches(1)[0][0])["loss"]
    expected = balance + ALPHA * sum(spectral_rank_penalty(block.router.weight, SIGMA) for block in model.blocks)
    torch.testing.assert_close(term - task, expected)
