"""All runs of a study: first those that choose each arm's coefficient, then the reported ones. Each is saved when done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from examples.image_classification.data import ImageSet, digest
from examples.image_classification.experiment import move, read
from examples.shared.command import Options
from examples.shared.progress import bars, console
from examples.shared.runs import interval, prepare, versions
from examples.shared.storage import read_json, write_json

from . import measure
from .arms import ARMS
from .claims import CLAIMS, judge, paired
from .config import Config
from .data import Split, split
from .train import coefficient, train

SCALARS = (
    "train_accuracy",
    "train_loss",
    "test_accuracy",
    "test_loss",
    "gap_accuracy",
    "gap_loss",
    "mean_noise_accuracy",
    "gradient_norm",
    "mean_sigma",
    "mean_energy",
    "mean_half_energy",
)
Run = dict[str, Any]


def run(config: Config, options: Options) -> dict[str, Any]:
    """Run the study, or what is left of it, and return what is written to results.json."""
    device = config.resolved_device()
    data = read(config.source())
    seeds = range(config.seeds)
    splits = {seed: split(data.labels, data.classes, config, seed) for seed in (*config.tuning_seeds, *seeds)}
    # only now, when nothing is left that could be wrong with the input
    fingerprint = digest(data)
    earlier = prepare(dataclasses.asdict(config) | {"device": str(device), "digest": fingerprint}, options)
    data = move(data, device)
    grids = {arm: config.multiples if ARMS[config.study][arm].published else [0.0] for arm in config.arms}
    with bars() as progress:
        tuned = _tune(config, grids, data, splits, options.out, progress)
        chosen = {arm: best(tuned[arm]) for arm in config.arms}
        runs = _report(config, chosen, data, splits, options.out, progress)
    results = {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "earlier_versions": earlier,
        "data": {
            "classes": data.classes,
            "digest": fingerprint,
            "image_shape": list(data.images.shape[1:]),
            "images": {name: len(getattr(splits[0], name)) for name in Split._fields},
        },
        "tuning": tuned,
        "chosen": {arm: {"multiple": value, "coefficient": coefficient(config, arm, value)} for arm, value in chosen.items()},
        "summary": {arm: {name: interval([run[name] for run in of_arm]) for name in SCALARS} for arm, of_arm in runs.items()},
        # from every arm that a claim holds another one against
        "differences": {
            against: {
                arm: {name: interval(paired(of_arm, runs[against], name)) for name in SCALARS}
                for arm, of_arm in runs.items()
                if arm != against
            }
            for against in dict.fromkeys(claim.against for claim in CLAIMS[config.study])
            if against in runs
        },
        "claims": [judge(claim, runs) for claim in CLAIMS[config.study] if {claim.arm, claim.against} <= set(config.arms)],
        "runs": runs,
    }
    write_json(options.out / "results.json", results)
    return results


def best(grid: list[Run]) -> float:
    """The multiple of the highest mean validation accuracy; of equal ones the smallest."""
    return float(min(grid, key=lambda point: (-point["val_accuracy"], point["multiple"]))["multiple"])


def _tune(
    config: Config, grids: dict[str, list[float]], data: ImageSet, splits: dict[int, Split], out: Path, progress: Progress
) -> dict[str, list[Run]]:
    """Each arm's grid with its mean validation accuracy. No test image is looked at here."""
    total = sum(map(len, grids.values())) * len(config.tuning_seeds)
    task = progress.add_task("choosing coefficients", total=total, note="")
    tuned: dict[str, list[Run]] = {arm: [] for arm in grids}
    for arm, multiples in grids.items():
        for multiple in multiples:
            scores = []
            for seed in config.tuning_seeds:

                def once(arm: str = arm, multiple: float = multiple, seed: int = seed) -> Run:
                    trained = train(config, arm, multiple, seed, data, splits[seed].train)
                    return {"seed": seed, **measure.validation(trained.network, data, splits[seed])}

                scores.append(_saved(out / "parts" / f"tuning-{arm}-{multiple:g}-seed{seed}.json", once))
                progress.update(task, advance=1, note=f"{arm} x {multiple:g}: {scores[-1]['val_accuracy']:.1f} %")
            point = {
                "multiple": multiple,
                "coefficient": coefficient(config, arm, multiple),
                "val_accuracy": fmean(score["val_accuracy"] for score in scores),
                "runs": scores,
            }
            tuned[arm].append(point)
        line = ", ".join(f"x {point['multiple']:g}: {point['val_accuracy']:.2f}" for point in tuned[arm])
        console.print(f"{arm:<18} validation accuracy, %: {line}", markup=False, highlight=False)
    return tuned


def _report(
    config: Config, chosen: dict[str, float], data: ImageSet, splits: dict[int, Split], out: Path, progress: Progress
) -> dict[str, list[Run]]:
    task = progress.add_task("runs", total=config.seeds * len(chosen), note="")
    runs: dict[str, list[Run]] = {arm: [] for arm in chosen}
    for seed in range(config.seeds):
        for arm, multiple in chosen.items():

            def once(arm: str = arm, multiple: float = multiple, seed: int = seed) -> Run:
                trained = train(config, arm, multiple, seed, data, splits[seed].train)
                figures = measure.everything(config, trained.network, data, splits[seed], seed)
                return {"seed": seed, "multiple": multiple, **figures, "history": trained.history}

            found = _saved(out / "parts" / f"{arm}-seed{seed}.json", once)
            runs[arm].append(found)
            progress.update(task, advance=1, note=f"{arm}: {found['test_accuracy']:.1f} %")
            console.print(
                f"{arm:<18} seed {seed}   test accuracy {found['test_accuracy']:6.2f} %   gap {found['gap_accuracy']:+6.2f}",
                markup=False,
                highlight=False,
            )
    return runs


def _saved(file: Path, once: Callable[[], Run]) -> Run:
    """What the file holds, or else what `once` finds, now in the file. Always read back: a resumed study has the same bytes."""
    if not file.exists():
        write_json(file, once())
    found: Run = read_json(file)
    return found
