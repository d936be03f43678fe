"""The examples' own training, with and without `--compile`: a step, what it launches, and their whole commands.

    python -m benchmarks.training --data FOLDER

The image example is `--data FOLDER --preset table2`, the language models `--bf16`. Without a folder one of random pixels is
made, for what the pixels are changes no time. `--quick` compiles nothing.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from examples.image_classification import config as image_config
from examples.image_classification import experiment
from examples.image_classification.data import as_float, load, to_layout
from examples.image_classification.train import build, compiled, forward, train_step
from examples.transformer_moe import arms
from examples.transformer_moe import config as language_config
from examples.transformer_moe import model as language_model

from ._harness import Report, device, interleave, parser, progress, publish, show_ms, show_ratio
from .launches import count

CLASSES, EACH, SIDE = 4, 1605, 64  # table 2 splits 1600 a class, and the commands below keep 5 novel ones
PLAIN, COMPILED = "as it is", "--compile"


def photos(root: Path, each: int) -> Path:
    """A folder of random pixels, one subfolder a class."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / str(label)).mkdir()
        for index in range(each):
            pixels = random.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{index}.png", compress_level=0)
    return root


def image_flags(data: Path, quick: bool) -> list[str]:
    small = ["--samples-per-class", "8", "--image-size", "16", "--layers", "2", "--dim", "16"] if quick else []
    return ["--data", str(data), "--preset", "table2", "--routers", "spectral", "--seeds", "1", *small]


def image_steps(data: Path, quick: bool) -> dict[str, Callable[[], object]]:
    """The training step of the image example, each way with a model of its own."""
    config, _ = image_config.parse(image_flags(data, quick))
    loaded = load(config)
    chosen = torch.randperm(len(loaded.labels), generator=torch.Generator().manual_seed(0))[: config.batch_size]
    images = to_layout(as_float(loaded.images[chosen].to(device())))
    labels = loaded.labels[chosen].to(device())
    calls: dict[str, Callable[[], object]] = {}
    for name, step in ((PLAIN, forward), (COMPILED, compiled(device()))):
        model, objective = build(config, "spectral", 0, loaded, device())
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        calls[name] = partial(train_step, step, model.train(), objective, optimizer, images, labels)
    return calls


def language_flags(quick: bool) -> list[str]:
    small = ["--layers", "1", "--dim", "16", "--hidden", "16", "--experts", "4", "--sequence", "16"] if quick else []
    return ["--bf16", "--report-to", "none", *small]


def language_steps(arm: str, quick: bool) -> dict[str, Callable[[], object]]:
    """What transformers' Trainer does at a step of the language models, each way with a model of its own."""
    config, _ = language_config.parse(language_flags(quick))
    ids = torch.randint(256, (config.batch_size, config.sequence), generator=torch.Generator().manual_seed(0)).to(device())
    calls: dict[str, Callable[[], object]] = {}
    for name in (PLAIN, COMPILED):
        model = language_model.build(config, 0).to(device()).train()
        arms.attach(model, arm, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
        calls[name] = partial(language_step, torch.compile(model) if name == COMPILED else model, optimizer, ids)
    return calls


def language_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    with torch.autocast(device().type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def first(call: Callable[[], object]) -> float:
    """Seconds of the first call, which compiles."""
    began = time.perf_counter()
    call()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def steps(report: Report, name: str, calls: dict[str, Callable[[], object]], repeats: int) -> None:
    progress(name)
    cost = {way: first(call) for way, call in calls.items()}
    seconds = interleave(calls, repeats)
    report.raw[name] = {**seconds, **{f"first, {way}": [value] for way, value in cost.items()}}
    for way, call in calls.items():
        counted = count(call)
        report.raw[name][f"launched, {way}"] = [float(counted.launched)]
        waits = "-" if counted.waits is None else str(counted.waits)
        report.rows.append(
            [
                name,
                way,
                f"{cost[way]:.3g}",
                show_ms(seconds[way]),
                show_ratio(seconds, way, PLAIN),
                str(counted.launched),
                waits,
            ]
        )


def whole(report: Report, name: str, run: Callable[[list[str]], object], flags: list[str]) -> None:
    """Seconds of a command but for its pictures, as it is and with --compile."""
    seconds: dict[str, list[float]] = {}
    for way in (PLAIN, COMPILED):
        progress(f"{name}, {way}")
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
            extra = ["--out", str(Path(out) / "run"), "--device", device().type, *([way] if way == COMPILED else [])]
            began = time.perf_counter()
            run([*flags, *extra])
            seconds[way] = [time.perf_counter() - began]
        report.rows.append([name, way, f"{seconds[way][0]:.3g}"])
    report.raw[name] = seconds


def commands(data: Path, quick: bool) -> Report:
    report = Report("The examples' commands, start to end", ["command", "", "s"])
    epochs, steps, novel = ("1", "2", "1") if quick else ("3", "100", "5")
    images = [*image_flags(data, quick), "--epochs", epochs, "--novel", novel]
    name = f"image_classification --preset table2, epochs: {epochs}"
    whole(report, name, lambda flags: experiment.run(*image_config.parse(flags)), images)
    report.notes = [
        "One seed, the spectral router alone, without pictures. In one process and this order: what the steps above compiled "
        "is in the compiler's cache."
    ]
    if find_spec("accelerate") is None:
        report.notes.append("Without transformer_moe, whose command needs accelerate, which is not installed.")
        return report
    from examples.transformer_moe import study

    small = ["--domain-bytes", "4096", "--validation-windows", "1"] if quick else []
    arms = ["both"] if quick else ["none", "both"]
    text = [*language_flags(quick), "--steps", steps, "--evaluations", "1", "--adapt-steps", "0", "--arms", *arms, *small]
    name = f"transformer_moe --bf16 --arms {' '.join(arms)}, steps: {steps}"
    whole(report, name, lambda flags: study.run(*language_config.parse(flags)), text)
    return report


@contextlib.contextmanager
def folder(given: Path | None, quick: bool) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield photos(Path(made), 9 if quick else EACH)


def measure(repeats: int, quick: bool, data: Path | None = None) -> list[Report]:
    kernels = "kernels" if device().type == "cuda" else "operators"
    report = Report(
        "The examples' training step, with and without --compile",
        ["step", "", "the first one, s", "ms", "against as it is", kernels, "waits"],
    )
    compiler: Any = torch.compiler.set_stance("force_eager") if quick else contextlib.nullcontext()
    with folder(data, quick) as images, compiler:
        steps(report, "image_classification --preset table2", image_steps(images, quick), repeats)
        for arm in ("none", "both"):
            steps(report, f"transformer_moe --bf16, {arm}", language_steps(arm, quick), repeats)
        return [report, commands(images, quick)]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser("training", __doc__, repeats=30)
    flags.add_argument("--data", type=Path, metavar="FOLDER", help="photos, a subfolder a class (default: random pixels)")
    arguments = flags.parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick, arguments.data), arguments.json)


if __name__ == "__main__":
    main()
