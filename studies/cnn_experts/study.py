"""All arms and seeds of one experiment: run what is missing, save each step, gather the results."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from examples.image_classification.data import ImageSet, Split, digest, split
from examples.image_classification.experiment import move, read
from examples.shared.command import ExperimentError, Options
from examples.shared.progress import bars, console
from examples.shared.runs import interval, prepare, versions
from examples.shared.storage import read_json, write_json

from . import claims
from .config import ARMS, Config
from .measure import constrained, cost, measure, scalars
from .model import inner_planes
from .train import build, train


def run(config: Config, options: Options) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what is written to results.json."""
    device = config.resolved_device()
    data, splits = images(config)
    fingerprint = digest(data)
    settings = dataclasses.asdict(config) | {"device": str(device), "digest": fingerprint}
    del settings["arms"]  # no arm depends on which others are run, so --resume may name more
    earlier = prepare(settings, options)
    data = move(data, device)
    parts: dict[str, list[dict[str, Any]]] = {arm: [] for arm in config.arms}
    with bars() as progress:
        total = progress.add_task("runs", total=config.seeds * len(config.arms), note="")
        for seed, chosen in enumerate(splits):
            for arm in config.arms:
                parts[arm].append(_run_one(config, arm, seed, data, chosen, options.out, progress))
                progress.advance(total)
    rows = {arm: [scalars(part) for part in of_arm] for arm, of_arm in parts.items()}
    results = {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions("torchvision", "scikit-learn"),
        "earlier_versions": earlier,
        "seeds": list(range(config.seeds)),
        "data": {
            "classes": data.classes,
            "digest": fingerprint,
            "unreadable": data.unreadable,
            "image_shape": list(data.images.shape[1:]),
            "images": {name: len(getattr(splits[0], name)) for name in ("train", "val", "test")},
        },
        "inner_planes": inner_planes(config),
        "plain": cost(build(config, "plain", 0, data, device), data.images),
        "summary": {arm: {name: interval([row[name] for row in of_arm]) for name in of_arm[0]} for arm, of_arm in rows.items()},
        "claims": claims.judge(rows),
        "runs": parts,
    }
    write_json(options.out / "results.json", results)
    return results


def images(config: Config) -> tuple[ImageSet, list[Split]]:
    """The images, and for each seed the split."""
    wanted = config.images()
    data = read(wanted)
    least = config.samples_per_class or 8
    for name, count in zip(data.classes, torch.bincount(data.labels, minlength=len(data.classes)).tolist(), strict=True):
        if count < least:
            raise ExperimentError(
                f"every class needs at least {least} images, got {count} in class {name!r}; add images, or change "
                "--samples-per-class or --classes"
            )
    return data, [split(data.labels, data.classes, wanted, seed) for seed in range(config.seeds)]


def _run_one(
    config: Config, arm: str, seed: int, data: ImageSet, chosen: Split, out: Path, progress: Progress
) -> dict[str, Any]:
    name = f"{arm}-seed{seed}"
    file = out / "parts" / f"{name}.json"
    if file.exists():
        part: dict[str, Any] = read_json(file)
        return part
    task = progress.add_task(f"{name}: training", total=config.epochs, note="")
    started = time.perf_counter()

    def on_epoch(row: dict[str, Any]) -> None:
        progress.update(task, advance=1, note=f"val {row['val_accuracy']:.1f} %")

    network, history = train(config, arm, seed, data, chosen, out / "models" / f"{name}.pt", on_epoch)
    test = chosen.test.to(data.images.device)
    part = {"seed": seed, "history": history, **cost(network, data.images)}
    part |= measure(network, data.images[test], data.labels[test], data.classes, picture=seed == 0)
    if ARMS[arm].constraint:
        part["constraint"] = constrained(history)
    write_json(file, part)
    progress.remove_task(task)
    used = f"   experts used {part['routing']['experts_used']}" if ARMS[arm].moe else ""
    # the time is only shown: results.json is the same each time
    console.print(f"{name:<18} accuracy {part['accuracy']:5.1f} %   {time.perf_counter() - started:5.1f} s{used}")
    return part
