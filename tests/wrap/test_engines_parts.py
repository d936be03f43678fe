"""What the engines' own blocks ask of the hooks, on models of a few lines."""

import pytest
import torch
from torch import Tensor, nn

from spectral_router import LoadBalanceLoss, find_gates, wrap_moe
from spectral_router.wrap.delivery import share_of_step


class Router(nn.Linear):
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:  # as Megatron-Core's
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, report: bool = False) -> None:
        super().__init__()
        self.router = Router(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.report = report

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        tokens = x.view(-1, 16)
        probs = self.router(tokens, padding_mask).softmax(-1)
        if self.report:
            self.router(x.view(-1, 16))  # for a log
        return sum(p * e(tokens) for p, e in zip(probs.split(1, -1), self.experts, strict=True))


def test_gate_run_again_on_the_same_tokens_counts_once() -> None:
    block, x = Block(report=True), torch.randn(2, 3, 16)
    handle = wrap_moe(block, penalty=None, balance_coef=1.0)
    block(x)
    with torch.no_grad():
        wanted = LoadBalanceLoss()(block.router(x.view(-1, 16)).softmax(-1))
    torch.testing.assert_close(handle.loss().detach(), wanted)


def test_tokens_changed_in_between_count_again() -> None:
    block, x = Block(), torch.randn(6, 16)
    twice = nn.Sequential(block)
    twice.forward = lambda x: (block(x), block(x.add_(1.0)))  # type: ignore[method-assign]
    handle = wrap_moe(twice, penalty=None, balance_coef=1.0)
    with torch.no_grad():
        first, second = (LoadBalanceLoss()(block.router(tokens).softmax(-1)) for tokens in (x, x + 1))
    twice(x.clone())
    torch.testing.assert_close(handle.loss().detach(), first + second)


@pytest.mark.parametrize("at_step", [False, True])
def test_padding_that_a_gate_is_told_of_is_left_out(at_step: bool) -> None:
    block, x, padding = Block(), torch.randn(6, 16), torch.tensor([False, True, False, False, True, False])
    wanted = torch.autograd.grad(LoadBalanceLoss()(block.router(x[~padding]).softmax(-1)), block.router.weight)[0]
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    handle = wrap_moe(block, optimizer if at_step else None, penalty=None, balance_coef=1.0)
    block(x, padding)
    if at_step:
        optimizer.step()
    else:
        handle.loss().backward()
    torch.testing.assert_close(block.router.weight.grad, wanted)


@pytest.mark.parametrize(("top_k", "scoring"), [(1, "sigmoid"), (2, "softmax")])
def test_megatrons_sinkhorn_says_how_it_scores(top_k: int, scoring: str) -> None:
    class TopKRouter(Router):  # its own forward, so that no layer tells
        def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            raise NotImplementedError

    block = Block()
    block.router = TopKRouter(16, 4)
    block.router.routing_type, block.router.score_function, block.router.topk = "sinkhorn", "softmax", top_k
    assert [gate.scoring for gate in find_gates(block)] == [scoring]


def test_share_of_step_knows_loss_div_factor() -> None:
    labels = torch.tensor([[1, -100, 2, 3]])
    assert float(share_of_step(nn.Linear(1, 1), {"labels": labels, "loss_div_factor": torch.tensor(12)})) == 0.25
    assert float(share_of_step(nn.Linear(1, 1), {"labels": labels, "loss_div_factor": 8, "ignore_index": 1})) == 0.375


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"lb_loss_weight": 0.01}, "OLMo-core's lb_loss_weight=0.01"),
        ({"load_balance_coeff": 1e-3, "tokens_per_expert_E": None}, "torchtitan's bias, load_balance_coeff=0.001"),
        ({"deepspeed_moe": None}, "l_aux that DeepSpeed's MoE layers return"),
        (
            {"config": type("C", (), {"moe_aux_loss_coeff": [0.1], "moe_router_load_balancing_type": ["aux_loss"]})()},
            r"Megatron's moe_aux_loss_coeff=\[0.1\]",
        ),
    ],
)
def test_an_engines_own_balance_is_told(attributes: dict[str, object], message: str) -> None:
    block = Block()
    vars(block).update(attributes)
    with pytest.warns(UserWarning, match=message):
        wrap_moe(block)
    block = Block()
    vars(block).update(attributes)
    wrap_moe(block, balance=None)  # warns of nothing
