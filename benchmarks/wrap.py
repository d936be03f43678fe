"""What `wrap_moe` adds to a training step of a Mixtral-like model: time as a ratio to the unwrapped model, and memory.

    python -m benchmarks.wrap

Steps with and without the hooks alternate in one process, on one model, so that drift of the machine hits both alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_router import SpectralRankPenalty, wrap_moe

WARM_UP = 2


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of one training step."""

    forward: float
    backward: float
    total: float


def build(layers: int, dim: int, hidden: int, experts: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model: nn.Module = MixtralForCausalLM(config).train()
    return model


class Clock:
    """Wall time on the CPU, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]  # type: ignore
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]  # type: ignore


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> tuple[float, float, float]:
    clock = Clock(ids.device)
    clock.mark()
    loss = model(input_ids=ids, labels=ids).loss
    clock.mark()
    loss.backward()
    clock.mark()
    optimizer.step()
    optimizer.zero_grad()
    clock.mark()
    forward, backward, update = clock.seconds()
    return forward, backward, forward + backward + update


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that one forward keeps for backward, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(storages.values())
    del loss
    return total


def live_tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():  # torch warns of some of its own names when one looks at every object
        warnings.simplefilter("ignore")
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def measure(model: nn.Module, ids: Tensor, repeats: int) -> dict[str, list[Step]]:
    """Seconds of alternating steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    penalty = SpectralRankPenalty("initial", relative=True)  # the default, one for the whole run as in training
    steps: dict[str, list[Step]] = {"unwrapped": [], "wrapped": []}
    for repeat in range(-WARM_UP, repeats):
        for name in sorted(steps, reverse=bool(repeat % 2)):  # in turns first and second
            with wrap_moe(model, penalty=penalty) if name == "wrapped" else nullcontext():
                step = Step(*train_step(model, optimizer, ids))
            if repeat >= 0:
                steps[name].append(step)
        if sys.stderr.isatty():
            print(f"\r{repeat + 1}/{repeats} ", end="", file=sys.stderr, flush=True)
    return steps


def memory(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """Bytes saved for backward, and tensors that stay alive from one wrapped step to the next."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with wrap_moe(model):
        train_step(model, optimizer, ids)
        before = live_tensors()
        train_step(model, optimizer, ids)
        growth = live_tensors() - before
    plain = saved_bytes(model, ids)
    with wrap_moe(model):
        return {"saved unwrapped": plain, "saved wrapped": saved_bytes(model, ids), "growth": growth}


def ratio(steps: dict[str, list[Step]], part: str) -> tuple[float, float, float]:
    """Median and quartiles of wrapped / unwrapped over pairs of neighbouring steps."""
    pairs = zip(steps["wrapped"], steps["unwrapped"], strict=True)
    low, middle, high = statistics.quantiles([getattr(a, part) / getattr(b, part) for a, b in pairs], n=4)
    return middle, low, high


def table(steps: dict[str, list[Step]], held: dict[str, int]) -> str:
    lines = ["| part | unwrapped, ms | wrapped / unwrapped | quartiles |", "|---|---|---|---|"]
    for part in ("forward", "backward", "total"):
        middle, low, high = ratio(steps, part)
        base = statistics.median(getattr(step, part) for step in steps["unwrapped"]) * 1e3
        lines.append(f"| {part} | {base:.1f} | {middle:.3f} | {low:.3f} - {high:.3f} |")
    saved = held["saved wrapped"] / held["saved unwrapped"]
    lines.append(f"| saved for backward | {held['saved unwrapped'] / 2**20:.1f} MiB | {saved:.3f} | |")
    lines.append(f"| tensors more alive after each step | 0 | {held['growth']:+d} | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wrap", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--hidden", type=int, default=512, help="width of an expert (default 512)")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="per step, in rows of 128 (default 512)")
    parser.add_argument("--repeats", type=int, default=30, help="pairs of steps (default 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(arguments.layers, arguments.dim, arguments.hidden, arguments.experts).to(device)
    ids = torch.randint(1024, (max(1, arguments.tokens // 128), 128), device=device)
    steps = measure(model, ids, arguments.repeats)
    name: str = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {name}; {arguments.layers} layers, {arguments.repeats} pairs of steps\n")
    held = memory(model, ids)
    print(table(steps, held))
    if arguments.json:
        record: dict[str, object] = {
            "torch": torch.__version__,
            "device": name,
            "arguments": {**vars(arguments), "json": str(arguments.json)},
        }
        record |= {"memory": held, "steps": {name: [asdict(step) for step in group] for name, group in steps.items()}}
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
