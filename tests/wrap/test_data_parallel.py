"""Replicas as `torch.nn.DataParallel` makes them: they run at once, in threads, and share the hooks of the original."""

from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty, wrap_moe


class MoE(nn.Module):
    meet: Barrier | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        probs = self.router(x).softmax(-1)
        if self.meet is not None:
            self.meet.wait(timeout=30)  # both are in the middle of their forward, as on two devices
        mixed = sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts, strict=True))
        return {"loss": (mixed - x).square().mean()}


def replica(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes one."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(copied, name, replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, parameter * 1)
    return copied


@pytest.mark.parametrize("attempt", range(5))
def test_the_term_arrives_once_in_the_mean_of_the_replicas(attempt: int) -> None:
    model, plain, losses = MoE(), MoE(), []
    x = torch.randn(8, 16)
    wrap_moe(model, penalty=SpectralRankPenalty(1.0), penalty_coef=1.0, balance=None)
    model.meet = Barrier(2)
    copies = [replica(model) for _ in range(2)]
    threads = [
        Thread(target=lambda one=one, part=part: losses.append(one(part)["loss"]))
        for one, part in zip(copies, x.chunk(2), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 2
    torch.stack(losses).mean().backward()
    (sum(plain(part)["loss"] for part in x.chunk(2)) / 2 + SpectralRankPenalty(1.0)([plain.router.weight])).backward()
    torch.testing.assert_close(model.router.weight.grad, plain.router.weight.grad, rtol=1e-4, atol=1e-6)
