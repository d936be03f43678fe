"""Balance losses with sync=True in one process; in two: `tests/distributed`."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_losses import LOSSES
from torch import Tensor

from spectral_router import LoadBalanceLoss


@pytest.mark.parametrize("group", [False, True], ids=["no group", "a group of one"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [False, True, True]])], ids=["all", "mask"])
@pytest.mark.parametrize("kind", LOSSES)
def test_alone_it_changes_nothing(tmp_path: Path, group: bool, mask: Tensor | None, kind: str) -> None:
    if group:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        probs = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
        values = [LOSSES[kind](sync=sync)(probs, mask) for sync in (False, True)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, probs)[0] for value in values))
    finally:
        if group:
            dist.destroy_process_group()


def test_a_single_token_without_its_dimension(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert LoadBalanceLoss(sync=True)(torch.tensor([0.75, 0.25])).item() == pytest.approx(0.25)
        with pytest.raises(ValueError, match="mask must have the shape of probs without its last dimension"):
            LoadBalanceLoss(sync=True)(torch.rand(3, 4), torch.ones(4))
    finally:
        dist.destroy_process_group()


def test_it_says_so() -> None:
    assert repr(LoadBalanceLoss(sync=True)) == "LoadBalanceLoss(unbiased=False, sync=True)"
