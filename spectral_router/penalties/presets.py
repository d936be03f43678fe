"""What a user wants of `SpectralRankPenalty`, in one word."""

from __future__ import annotations

from typing import Literal, get_args

from .spectral_rank import SpectralRankPenalty

Preset = Literal["spread", "hold", "paper"]


def preset(name: Preset) -> SpectralRankPenalty:
    """A new penalty.

    "spread", for training from scratch: up to the largest stable rank, at the initial norm. "hold", for fine-tuning: neither a
    lower stable rank nor a higher norm than at the start. "paper": equations 3 + 5 as printed, at norm 1.
    """
    if name not in get_args(Preset):
        raise ValueError(f'penalty must be "spread", "hold", "paper", a callable or None, got penalty={name!r}')
    if name == "spread":
        return SpectralRankPenalty("initial", relative=True)
    if name == "hold":
        return SpectralRankPenalty("initial", "initial", relative=True, one_sided=True)
    return SpectralRankPenalty()
