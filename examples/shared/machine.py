"""What a run asks of the machine, asked before it begins: memory for its network, a compiler."""

from __future__ import annotations

import os

import torch
from torch import nn

from .command import ExperimentError

# of a parameter that Adam trains, in float32: itself, its gradient, two moments
BYTES = 16


def check_memory(network: nn.Module, device: torch.device, flags: str) -> None:
    """ExperimentError if the network, which may be on the device "meta", is too large to be trained on `device`; `flags` make
    it smaller."""
    numbers = sum(parameter.numel() for parameter in network.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    if BYTES * numbers > there:
        raise ExperimentError(
            f"the network must fit into memory, got {numbers:,} parameters, which take {BYTES * numbers / 2**30:,.0f} GiB in "
            f"training, where there are {there / 2**30:,.0f}; lower {flags}"
        )


def check_compiler(device: torch.device) -> None:
    """ExperimentError if torch.compile cannot compile here."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    try:
        torch.compile(probe)(torch.zeros(8, device=device))
    except Exception as error:  # inductor has a class of its own for each thing that may be missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExperimentError(
            f"--compile needs a compiler that torch can use (of C++ on a CPU, Triton on a GPU), got none: {reason}; install "
            "one, or leave --compile out"
        ) from None
