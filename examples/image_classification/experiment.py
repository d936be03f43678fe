"""All routers and seeds of one experiment: run what is missing, save each step, gather the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from examples.shared.command import Options
from examples.shared.machine import check_compiler, check_memory
from examples.shared.progress import bars, console
from examples.shared.runs import interval, prepare, versions
from examples.shared.storage import read_json, write_json

from . import oneshot, routing
from .config import Config
from .data import ImageSet, Split, digest, load, split
from .evaluate import accuracy, predict, spectra
from .model import SRMoE
from .train import Trained, train


def run(config: Config, options: Options) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and return what is written to results.json."""
    device = config.resolved_device()
    if config.compile:
        check_compiler(device)
    data = read(config)
    splits = [split(data.labels, data.classes, config, seed) for seed in range(config.seeds)]
    with torch.device("meta"):
        largest = SRMoE(config, config.routers[0], data.images.shape[1], len(data.classes))
    check_memory(largest, device, "--dim, --hidden, --experts or --layers")
    # only now, when nothing is left that could be wrong with the input
    fingerprint = digest(data)
    earlier = prepare(dataclasses.asdict(config) | {"device": str(device), "digest": fingerprint}, options)
    data = move(data, device)
    parts: dict[str, list[dict[str, Any]]] = {router: [] for router in config.routers}
    with bars() as progress:
        total = progress.add_task("runs", total=config.seeds * len(config.routers), note="")
        for seed, chosen in enumerate(splits):
            for router in config.routers:
                part = _run_one(config, router, seed, data, chosen, options.out, progress)
                parts[router].append(part)
                progress.advance(total)
    results = {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "earlier_versions": earlier,
        "seeds": list(range(config.seeds)),
        "data": {
            "classes": data.classes,
            "digest": fingerprint,
            "unreadable": data.unreadable,
            "image_shape": list(data.images.shape[1:]),
            "images": {name: len(getattr(splits[0], name).flatten()) for name in Split._fields},
        },
        "summary": {router: summarize(of_router) for router, of_router in parts.items()},
        "runs": parts,
    }
    write_json(options.out / "results.json", results)
    return results


def read(config: Config) -> ImageSet:
    """The images, and a word about those that could not be read."""
    data = load(config)
    for name in data.unreadable:
        console.print(f"skipped, not readable as an image: {name}", style="yellow", markup=False, soft_wrap=True)
    if data.unreadable:
        console.print(f"skipped {len(data.unreadable)}, read {len(data.labels)}", style="yellow")
    return data


def move(data: ImageSet, device: torch.device) -> ImageSet:
    return data._replace(images=_to(data.images, device), labels=_to(data.labels, device))


def _run_one(
    config: Config, router: str, seed: int, data: ImageSet, chosen: Split, out: Path, progress: Progress
) -> dict[str, Any]:
    name = f"{router}-seed{seed}"
    file = out / "parts" / f"{name}.json"
    part: dict[str, Any] = read_json(file) if file.exists() else {}
    if part.get("complete"):
        return part
    task = progress.add_task(f"{name}: training", total=config.epochs, note="")

    def on_epoch(row: dict[str, Any]) -> None:
        progress.update(task, advance=1, note=f"val {row['val_accuracy']:.1f} %")

    trained = train(config, router, seed, data, chosen, out / "models" / f"{name}.pt", on_epoch)
    if not part:
        test = chosen.test.to(data.images.device)
        logits, weights = predict(trained.model, data.images[test])
        part = {
            "seed": seed,
            "accuracy": accuracy(logits, data.labels[test]),
            "routing": routing.measure(weights, data.labels[test], data.classes),
            **spectra(trained.model),
            "history": trained.history,
            "adapted": [],
        }
    _adapt(config, name, trained, data, chosen, part, file, progress, task)
    part |= {"oneshot": oneshot.summarize(part["adapted"], data.classes), "complete": True}
    write_json(file, part)
    progress.remove_task(task)
    console.print(
        f"{name:<28} accuracy {part['accuracy']:5.1f} %   mean delta {part['oneshot']['mean_delta']:+6.2f}   "
        f"paths {part['routing']['paths_used']}"
    )
    return part


def _adapt(
    config: Config,
    name: str,
    trained: Trained,
    data: ImageSet,
    chosen: Split,
    part: dict[str, Any],
    file: Path,
    progress: Progress,
    task: TaskID,
) -> None:
    done: list[oneshot.Record] = part["adapted"]
    progress.reset(task, total=chosen.novel.numel(), completed=len(done), description=f"{name}: one-shot", note="")

    def save(record: oneshot.Record) -> None:
        done.append(record)
        write_json(file, part)
        progress.advance(task)

    oneshot.adapt(config, part["seed"], trained, data, chosen, list(done), save)


def summarize(parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and half-width of the 95 % interval (Student's t) over seeds, of every number that a table shows."""

    def figures(part: dict[str, Any]) -> dict[str, float | None]:
        scalars: dict[str, float | None] = {"accuracy": part["accuracy"]}
        scalars |= {f"delta/{name}": value for name, value in part["oneshot"]["delta"].items()}
        scalars |= {name: value for name, value in part["oneshot"].items() if not isinstance(value, list | dict)}
        scalars |= {name: value for name, value in part["routing"].items() if not isinstance(value, list | dict)}
        for name in ("spectral_norm", "stable_rank"):
            scalars |= {f"{name}/{layer}": value for layer, value in enumerate(part[name], 1)}
        for name in ("importance_cv2", "load_cv2", "entropy"):
            scalars |= {f"{name}/{layer}": value for layer, value in enumerate(part["routing"][name], 1)}
        return scalars

    rows = [figures(part) for part in parts]
    return {name: interval([row[name] for row in rows]) for name in rows[0]}


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
