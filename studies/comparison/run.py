"""Tuning, training, one-shot tests at several rates, and the time of a step: each part is saved as soon as it is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from benchmarks._harness import interleave, ratio
from examples.image_classification import oneshot, routing
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split, as_float, digest, split, to_layout
from examples.image_classification.evaluate import accuracy, predict, spectra
from examples.image_classification.experiment import move, read
from examples.image_classification.train import Trained, build, forward, train, train_step
from examples.shared.command import Options
from examples.shared.progress import bars, console
from examples.shared.runs import prepare, versions
from examples.shared.storage import read_json, write_json
from studies.oneshot.plasticity import interference

from .arms import ARMS, REFERENCE

# Of the one-shot update. The experiment's own rate is the third. At twice the last one, three arms of seed 0 learned less.
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
# Arms are compared where the mean loss of the novel images has fallen by this share, which all three of that trial reached.
PLASTICITY = 0.2
TUNING_SEED = 1000  # the first of those that choose the strengths
TIMED_STEPS = 60
BASE = "no penalty"  # of the ratio of times


def run(config: Config, options: Options, names: list[str], tuning_seeds: int) -> dict[str, Any]:
    """Run the comparison, or what is left of it, and return what is written to results.json."""
    device = config.resolved_device()
    data = read(config)
    fingerprint = digest(data)
    asked = {"arms": names, "tuning_seeds": tuning_seeds, "device": str(device), "digest": fingerprint}
    earlier = prepare(dataclasses.asdict(config) | asked, options)
    data = move(data, device)
    with bars() as progress:
        grids = _tune(config, names, tuning_seeds, data, options.out, progress)
        chosen = {name: _best(grid) for name, grid in grids.items()}
        configs = {name: ARMS[name].config(config, chosen[name]) for name in names}
        task = progress.add_task("arms and seeds", total=len(names) * config.seeds, note="")
        parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for seed in range(config.seeds):
            for name in names:
                progress.update(task, note=name)
                parts[name].append(_final_run(configs[name], name, seed, data, options.out))
                progress.advance(task)
        times = _times(configs, data, options.out)
    results = {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "earlier_versions": earlier,
        "data": {"classes": data.classes, "digest": fingerprint, "images": _sizes(data, config)},
        "plasticity": PLASTICITY,
        "rates": list(RATES),
        "reference": REFERENCE,
        "tuning_seeds": [TUNING_SEED + seed for seed in range(tuning_seeds)],
        "tuning": {name: {f"{value:g}": scores for value, scores in grid.items()} for name, grid in grids.items()},
        "chosen": chosen,
        "step_time": times,
        "runs": parts,
    }
    write_json(options.out / "results.json", results)
    return results


def _tune(
    config: Config, names: list[str], seeds: int, data: ImageSet, out: Path, progress: Progress
) -> dict[str, dict[float, list[float]]]:
    """By arm and strength: the validation accuracies of the tuning seeds."""
    grids: dict[str, dict[float, list[float]]] = {name: {} for name in names}
    task = progress.add_task("tuning", total=seeds * sum(len(ARMS[name].candidates()) for name in names), note="")
    for name in names:
        progress.update(task, note=name)
        for value in ARMS[name].candidates():
            scores = grids[name][value] = []
            for seed in range(TUNING_SEED, TUNING_SEED + seeds):
                file = out / "tuning" / f"{_slug(name)}-{value:g}-seed{seed}.json"
                if not file.exists():
                    trained, checkpoint = _train(ARMS[name].config(config, value), file.stem, seed, data, out)
                    write_json(file, {"val_accuracy": trained.history[-1]["val_accuracy"]})
                    checkpoint.unlink(missing_ok=True)
                scores.append(float(read_json(file)["val_accuracy"]))
                progress.advance(task)
    return grids


def _best(grid: dict[float, list[float]]) -> float | None:
    """The strength with the highest mean; of equals the weakest."""
    return max(grid, key=lambda value: fmean(grid[value])) if grid else None


def _train(arm: Config, name: str, seed: int, data: ImageSet, out: Path) -> tuple[Trained, Path]:
    chosen = split(data.labels.cpu(), data.classes, arm, seed)
    checkpoint = out / "models" / f"{name}.pt"
    return train(arm, arm.routers[0], seed, data, chosen, checkpoint, lambda row: None), checkpoint


def _final_run(arm: Config, name: str, seed: int, data: ImageSet, out: Path) -> dict[str, Any]:
    file = out / "parts" / f"{_slug(name)}-seed{seed}.json"
    part: dict[str, Any] = read_json(file) if file.exists() else {}
    if len(part.get("oneshot", ())) == len(RATES):
        return part
    chosen = split(data.labels.cpu(), data.classes, arm, seed)
    trained, checkpoint = _train(arm, file.stem, seed, data, out)
    if not part:
        test = chosen.test.to(data.images.device)
        logits, weights = predict(trained.model, data.images[test])
        part = {
            "seed": seed,
            "accuracy": accuracy(logits, data.labels[test]),
            "routing": routing.measure(weights, data.labels[test], data.classes),
            **spectra(trained.model),
            "rescued": sum(row.get("rescued", 0) for row in trained.history),
            "oneshot": [],
        }
    for rate in RATES[len(part["oneshot"]) :]:
        records: list[oneshot.Record] = []
        oneshot.adapt(dataclasses.replace(arm, oneshot_lr=rate), seed, trained, data, chosen, [], records.append)
        means = {key: fmean(record[key] for record in records) for key in ("delta", "loss_before", "loss_after")}
        part["oneshot"].append({"lr": rate, **means})
        write_json(file, part)
    checkpoint.unlink(missing_ok=True)
    at = interference(part["oneshot"], PLASTICITY)
    console.print(
        f"{name:<24} seed {seed}  accuracy {part['accuracy']:5.1f} %   interference "
        + ("not reached" if at is None else f"{at:+.2f}"),
        markup=False,
    )
    return part


def _times(configs: dict[str, Config], data: ImageSet, out: Path) -> dict[str, list[float]]:
    """A training step of each arm against that of `BASE`, taken in turns: median and quartiles of the ratio."""
    file = out / "step_time.json"
    if file.exists():
        return read_json(file)
    arms = {BASE: ARMS[BASE].config(next(iter(configs.values())), None)} | configs

    def step_of(config: Config) -> Any:
        device = data.images.device
        model, objective = build(config, config.routers[0], 0, data, device)
        objective.measure = False  # a term that is only looked at must not cost the arms that do without
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        images = to_layout(as_float(data.images[: config.batch_size]))
        labels = data.labels[: config.batch_size]
        model.train()
        return lambda: train_step(forward, model, objective, optimizer, images, labels)

    seconds = interleave({name: step_of(config) for name, config in arms.items()}, TIMED_STEPS)
    times = {name: list(ratio(seconds, name, BASE)) for name in configs}
    write_json(file, times)
    return times


def _sizes(data: ImageSet, config: Config) -> dict[str, int]:
    first = split(data.labels.cpu(), data.classes, config, 0)
    return {name: len(getattr(first, name).flatten()) for name in Split._fields}


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.replace("²", "2").replace("σ", "sigma")).strip("-").lower()
