"""One run: a plain loop, as its figures need no checkpoint and a run costs seconds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from examples.transformer_moe import data, measure, model
from examples.transformer_moe.config import Config
from examples.transformer_moe.data import Text
from spectral_router import Gate, MoEHandle, find_gates

from . import arms
from .protocol import Run

WORST = math.log(256)  # nats a byte: a uniform guess, what a run that diverged counts as
CLIP = 1.0
Record = dict[str, Any]


def train(config: Config, run: Run, text: Text, clip: float = CLIP) -> Record:
    """What is kept of a run."""
    started = time.perf_counter()
    network = model.build(config, run.seed)
    network.set_experts_implementation("grouped_mm")  # on a CPU several times faster than a loop over experts
    rows = data.draw(text, config, run.seed, config.steps).rows
    optimizer = arms.prepare(network, run.arm, run.strength, run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, config.steps))
    network.train()
    for batch in rows.split(config.batch_size):
        loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        schedule.step()
    if (handle := MoEHandle.of(network)) is not None:
        handle.remove()
    gates = find_gates(network)
    with rounding(gates) as flips:
        now = measure.evaluate(network, gates, text, config)
    loads = measure.load(now["experts"], config.experts)
    mean = float(now["loss"].mean())
    return {
        **run._asdict(),
        "loss": min(mean, WORST) if math.isfinite(mean) else WORST,
        "diverged": not mean < WORST,
        "domains": now["loss"].tolist(),
        "dead": int((loads < measure.DEAD / config.experts).sum()),
        "flips": sum(map(float, flips)) / len(flips),
        "spectral_norm": now["spectral_norm"].tolist(),
        "stable_rank": now["stable_rank"].tolist(),
        "load_cv": (loads.std(-1, correction=0) * config.experts).tolist(),
        "seconds": time.perf_counter() - started,
    }


def share(step: int, steps: int) -> float:
    """Of the rate: warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@contextlib.contextmanager
def rounding(gates: list[Gate]) -> Iterator[list[Tensor]]:
    """Share of the tokens, a gate and call, whose set of experts another rounding changes: the gate alone in bfloat16."""
    found: list[Tensor] = []

    def note(gate: Gate, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tokens = rearrange(args[0], "... d -> (...) d").bfloat16()
        rounded = F.linear(tokens, gate.weight.bfloat16()).float().topk(output[2].shape[-1], dim=-1).indices
        exact = output[0].float().topk(output[2].shape[-1], dim=-1).indices
        found.append((rounded.sort(-1).values != exact.sort(-1).values).any(-1).double().mean())

    hooks = [
        gate.module.register_forward_hook(lambda module, args, output, gate=gate: note(gate, args, output)) for gate in gates
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
