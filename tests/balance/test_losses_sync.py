"""Balance losses with sync=True: every rank has that of the global batch, and the mean of the ranks' gradients is its own."""

import itertools
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import names, run
from torch import Tensor

from spectral_router import LoadBalanceLoss
from spectral_router.balance.losses import ImportanceKLLoss, MutualInformationLoss, SwitchLoss

LOSSES = {
    "biased": LoadBalanceLoss,
    "unbiased": partial(LoadBalanceLoss, unbiased=True),
    "kl": ImportanceKLLoss,
    "mi": MutualInformationLoss,
    "switch": partial(SwitchLoss, 2),
}
CLOSE = {torch.float64: 1e-12, torch.bfloat16: 1e-2}
SIZES = {"uneven": (7, 2), "empty": (7, 0), "nothing": (0, 0)}  # tokens of each rank


def shares(sizes: tuple[int, int], masked: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Inputs and mask of each rank; with a mask, the second rank has no token that counts."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, size, 3, generator=generator) + rank for rank, size in enumerate(sizes)]
    masks = [torch.arange(size)[None] < (4 if rank == 0 else 0) if masked else None for rank, size in enumerate(sizes)]
    return list(zip(x, masks, strict=True))


def check(rank: int, *, sizes: tuple[int, int], masked: bool, kind: str, dtype: torch.dtype, compiled: bool = False) -> float:
    weight = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    parts = [((x @ weight).softmax(-1).to(dtype), mask) for x, mask in shares(sizes, masked)]
    probs = torch.cat([probs for probs, _ in parts], 1)
    mask = torch.cat([mask for _, mask in parts], 1) if masked else None
    expected = LOSSES[kind]()(probs, mask)
    wanted = torch.autograd.grad(expected, weight, retain_graph=True)[0]
    assert (expected != 0) == (sum(sizes) > 0)
    loss = LOSSES[kind](sync=True)
    if compiled:
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)  # the compiler's
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = loss(*parts[rank])
    assert value.dtype == expected.dtype
    grad = torch.autograd.grad(value, weight)[0]
    dist.all_reduce(grad)
    off, off_grad = abs(value - expected) / expected.abs().clamp_min(1e-9), (grad / 2 - wanted).norm()
    return max(off, off_grad / wanted.norm().clamp_min(1e-9)).item() / CLOSE[dtype]


def nan_on_one_rank(rank: int) -> float:
    """A NaN on one is everyone's."""
    probs = torch.full((3, 4), 0.25)
    probs[0, 0] = float("nan") if rank == 0 else 0.25
    return 0.0 if all(loss(sync=True)(probs).isnan() for loss in LOSSES.values()) else 2.0


CHECKS = {
    f"{size}-{'masked' if masked else 'all'}-{kind}-{str(dtype)[6:]}": partial(
        check, sizes=SIZES[size], masked=masked, kind=kind, dtype=dtype
    )
    for size, masked, kind, dtype in itertools.product(SIZES, (False, True), LOSSES, (torch.float64, torch.bfloat16))
}
CHECKS["NaN"] = nan_on_one_rank
for _kind in LOSSES:
    CHECKS[f"compiled-{_kind}"] = partial(
        check, sizes=SIZES["uneven"], masked=True, kind=_kind, dtype=torch.float64, compiled=True
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return run(["test_losses_sync"], tmp_path_factory.mktemp("sync"))


@pytest.mark.slow
@pytest.mark.parametrize("name", names(__name__))
def test_two_processes(two: dict[str, float | str], name: str) -> None:
    assert isinstance(two[name], float), two[name]
    assert two[name] < 1


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
