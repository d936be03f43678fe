"""Projections of rows to few dimensions: drawn from hashed numbers, or climbed to by gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from .._precision import full_precision
from .energy_formula import cosines

_Int = TypeVar("_Int", int, Tensor)


def project(batch: Tensor, projections: Tensor) -> Tensor:
    """(B, K, d) by (n, p, d) or (B, n, p, d) -> (B, n, K, p), as one matmul."""
    with full_precision(batch.device):
        flat = batch @ projections.flatten(-3, -2).mT
    return rearrange(flat, "b k (n p) -> b n k p", n=projections.shape[-3])


def angles_kept(batch: Tensor, projections: Tensor) -> Tensor:
    """(B, n): minus the mean squared error of the cosines."""
    with full_precision(batch.device):
        return -(cosines(project(batch, projections)) - cosines(batch)[:, None]).square().mean((-2, -1))


def climb(score: Callable[[Tensor, Tensor], Tensor], family: list[Tensor], start: Tensor, steps: int, lr: float) -> Tensor:
    """Projections after gradient steps that raise their score, each by itself; no host synchronisation.

    The unit of `lr` is one that serves all shapes: scores do not change with the length of P, so gradients shrink as 1/‖P‖;
    they see its part in the span of the rows only, min(K, d)/d of ‖P‖²; and each row's share of a mean is about 1/K.
    """
    with torch.inference_mode(False), torch.enable_grad():
        family = [batch.detach().clone() for batch in family]
        best = start.detach().clone()
        rank, dim = max(min(batch.shape[-2:]) for batch in family), best.shape[-1]
        rate = lr * rank**2 / dim

        def scores_of(projections: Tensor) -> Tensor:
            scores = torch.cat([score(batch, projections) for batch in family])
            return scores if projections.ndim == 4 else scores.mean(0)

        for _ in range(steps):
            best.requires_grad_()
            value = scores_of(best)
            (slope,) = torch.autograd.grad(value.sum(), best)
            with torch.no_grad():
                here, step = best, rate * best.square().sum((-2, -1), keepdim=True) * slope
                for shrink in (1, 4, 16):
                    moved = here + step / shrink
                    reached = scores_of(moved)
                    better = reached > value
                    value, best = torch.where(better, reached, value), torch.where(better[..., None, None], moved, best)
    return best


def normal(key: Tensor, count: int) -> Tensor:
    """(count,) iid normal numbers that are a function of the key: Box-Muller on hashed indices.

    A generator would need its seed, and with it the number of steps, on the host.
    """
    half = (count + 1) // 2
    bits = mix(mix(torch.arange(2 * half, device=key.device)) ^ key)
    uniform = ((bits >> 8).float() + 0.5) / 2**24
    radius, angle = (-2 * uniform[:half].log()).sqrt(), 2 * math.pi * uniform[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def mix(x: _Int) -> _Int:
    """A bijection of 32-bit integers (held in int64) in which every bit of the input moves about half of those of the output.

    The second factor is the usual 0x846CA68B less 2^32: the same product in 32 bits, and none leaves 64.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & 0xFFFFFFFF
    return x ^ (x >> 16)
