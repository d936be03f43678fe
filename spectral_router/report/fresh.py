"""What a gate of the same shape has before training, so that a number means something."""

from __future__ import annotations

import functools

import torch

from .geometry import SCALE_FREE, geometry

_ENTRIES = 2**23  # drawn for one shape
_DRAWS = (8, 64)  # at least, at most


@functools.lru_cache(maxsize=64)
def fresh(num_experts: int, dim: int) -> dict[str, tuple[float, float, float]]:
    """5 %, 50 % and 95 % quantile of each scale-free number over fresh gates of this shape; the same on each call.

    Fresh: independent normal entries of one variance. Uniform entries (`nn.Linear`'s own start) differ by less than the spread
    that is given here, as these numbers see sums of many entries only.

    >>> low, median, high = fresh(8, 64)["stable_rank"]
    >>> round(median)
    5
    """
    draws = max(_DRAWS[0], min(_DRAWS[1], _ENTRIES // (num_experts * dim)))
    generator = torch.Generator().manual_seed(0)
    seen = [geometry(torch.randn(num_experts, dim, generator=generator)) for _ in range(draws)]
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    told = {}
    for name in SCALE_FREE:
        values = torch.tensor([getattr(one, name) for one in seen], dtype=torch.float64)
        # an infinite condition, of more experts than can be told apart, has no quantiles between others
        low, median, high = torch.quantile(values.nan_to_num(posinf=1e300), quantiles).tolist()
        told[name] = (low, median, high)
    return told
