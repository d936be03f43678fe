"""What `wrap_moe` adds to a training step of a Mixtral-like model: time as a ratio to the unwrapped model, and memory.

    python -m benchmarks.wrap

Steps with and without the hooks alternate in one process, on two copies of one model, so that drift of the machine hits both
alike. The first forward, which is watched, falls into the warm-up; `benchmarks.first_forward` has it.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from spectral_router import wrap_moe

from ._harness import WARM_UP, Clock, Report, device, parser, peak_bytes, progress, publish, show_ms, show_ratio

PARTS = ("forward", "backward", "step")


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


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> dict[str, float]:
    """Seconds of forward, of backward, and of the whole step."""
    clock = Clock()
    loss = model(input_ids=ids, labels=ids).loss
    clock.mark()
    loss.backward()
    clock.mark()
    optimizer.step()
    optimizer.zero_grad()
    clock.mark()
    forward, backward, update = clock.seconds()
    return {"forward": forward, "backward": backward, "step": forward + backward + update}


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


def times(model: nn.Module, ids: Tensor, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by part of alternating steps."""
    models = {"unwrapped": model, "wrapped": copy.deepcopy(model)}
    wrap_moe(models["wrapped"])
    optimizers = {name: torch.optim.AdamW(one.parameters(), lr=1e-4) for name, one in models.items()}
    seconds: dict[str, dict[str, list[float]]] = {part: {"unwrapped": [], "wrapped": []} for part in PARTS}
    for repeat in range(-WARM_UP, repeats):
        progress(f"wrap: {repeat + 1} of {repeats}")
        for name in sorted(("unwrapped", "wrapped"), reverse=bool(repeat % 2)):  # in turns first and second
            step = train_step(models[name], optimizers[name], ids)
            if repeat >= 0:
                for part in PARTS:
                    seconds[part][name].append(step[part])
    return seconds


def memory(model: nn.Module, ids: Tensor) -> dict[str, dict[str, list[float]]]:
    """Bytes saved for backward, the peak of a step, and the tensors that a step leaves alive."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = partial(train_step, model, optimizer, ids)
    held: dict[str, dict[str, list[float]]] = {part: {} for part in ("saved for backward", "peak", "tensors left")}
    for name in ("unwrapped", "wrapped"):
        with wrap_moe(model) if name == "wrapped" else nullcontext():
            step()
            before = live_tensors()
            step()
            held["tensors left"][name] = [live_tensors() - before]
            held["saved for backward"][name] = [saved_bytes(model, ids)]
            held["peak"][name] = [peak_bytes(step)]
    return held


def measure(
    repeats: int, quick: bool, *, layers: int = 16, dim: int = 256, hidden: int = 512, tokens: int = 512
) -> list[Report]:
    if quick:
        layers, dim, hidden, tokens = 2, 32, 32, 128
    model = build(layers, dim, hidden, experts=8).to(device())
    ids = torch.randint(1024, (max(1, tokens // 128), 128), device=device())
    report = Report(
        f"wrap_moe on a Mixtral-like model of {layers} layers, dim {dim}, {tokens} tokens",
        ["part", "unwrapped", "wrapped / unwrapped"],
    )
    report.raw = {**times(model, ids, repeats), **memory(model, ids)}
    for part in PARTS:
        report.rows.append(
            [part, f"{show_ms(report.raw[part]['unwrapped'])} ms", show_ratio(report.raw[part], "wrapped", "unwrapped", 3)]
        )
    for part in ("saved for backward", "peak"):
        plain, wrapped = (report.raw[part][name][0] for name in ("unwrapped", "wrapped"))
        report.rows.append([part, f"{plain / 2**20:.1f} MiB", f"{wrapped / plain:.3f}"])
    left = report.raw["tensors left"]
    report.rows.append(["tensors left alive by a step", f"{left['unwrapped'][0]:+.0f}", f"{left['wrapped'][0]:+.0f}"])
    return [report]


def command(name: str, doc: str | None, repeats: int, measure: Callable[..., list[Report]], argv: Sequence[str] | None) -> None:
    """The command of a benchmark on such a model: its sizes as flags."""
    flags = parser(name, doc, repeats=repeats)
    flags.add_argument("--layers", type=int, default=16, help="(default 16)")
    flags.add_argument("--dim", type=int, default=256, help="hidden size (default 256)")
    flags.add_argument("--hidden", type=int, default=512, help="width of an expert (default 512)")
    flags.add_argument("--tokens", type=int, default=512, help="per step, in rows of 128 (default 512)")
    got = flags.parse_args(argv)
    publish(measure(got.repeats, got.quick, layers=got.layers, dim=got.dim, hidden=got.hidden, tokens=got.tokens), got.json)


def main(argv: Sequence[str] | None = None) -> None:
    command("wrap", __doc__, 30, measure, argv)


if __name__ == "__main__":
    main()
