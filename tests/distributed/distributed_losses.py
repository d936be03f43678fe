"""Balance losses with sync=True: every rank has that of the global batch, and the mean of the ranks' gradients is its own.

Each check gives the error as a share of what it may be.
"""

import itertools
import warnings
from functools import partial

import torch
import torch.distributed as dist
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
