"""Do the runs of the protocol, any number of processes side by side: each takes the next run that nobody has begun.

A run that is done is a file in OUT/parts; what is left of a killed one is its model after the last whole epoch.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from examples.image_classification import oneshot, routing
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split, digest, split
from examples.image_classification.evaluate import accuracy, predict, spectra
from examples.image_classification.experiment import move, read
from examples.image_classification.train import Trained, train
from examples.shared.command import ExperimentError
from examples.shared.progress import bars, console
from examples.shared.runs import versions
from examples.shared.storage import read_json, write_json
from studies.oneshot.stacked import adapt_stacked
from studies.queue import Record, begin, file_of, finish, same

from . import choice
from .protocol import STAGES, Protocol, Run, Settings, runs

PICTURED = 3  # seeds whose table of paths is kept


def study(protocol: Protocol, places: dict[str, str], out: Path, stages: tuple[str, ...] = STAGES, only: str = "") -> None:
    """Do what is left of the stages, in their order; of their runs those whose name contains `only`."""
    begin(out, protocol)
    images = Images(out)
    found = False
    with bars() as progress:
        for stage in stages:
            try:
                arms = _arms(protocol, stage, places, out)
            except MissingRunsError as missing:
                if only:  # what is asked for may well be in another stage
                    console.print(f"stage {stage} left out: {missing}", markup=False, soft_wrap=True)
                    continue
                raise
            wanted = [one for one in runs(protocol, stage, places, arms) if only in one.name]
            found = found or bool(wanted)
            finish(wanted, stage, out, progress, lambda one: _do(one, images, out, progress))
    if not found:
        raise ExperimentError(f"--only must be part of the name of a run, got {only}" if only else "there is nothing to run")


def _arms(protocol: Protocol, stage: str, places: dict[str, str], out: Path) -> dict[str, Settings] | None:
    """The arms of a stage that earlier ones decide. {} where those have no runs, for want of data."""
    if stage == "second":
        swept = runs(protocol, "sweep", places)
        return choice.candidates(protocol, _all(swept, out)) if swept else {}
    if stage == "confirm":
        arms = _arms(protocol, "second", places, out)
        assert arms is not None
        if not arms:
            return {}
        chosen = choice.winner(_all(runs(protocol, "second", places, arms), out))
        return {router: {"routers": [router]} for router in protocol["confirm"]["routers"]} | {chosen: arms[chosen]}
    return None


class MissingRunsError(ExperimentError):
    """Runs that a stage depends on."""


def _all(wanted: list[Run], out: Path) -> list[Record]:
    if missing := [one.name for one in wanted if not file_of(out, one).exists()]:
        raise MissingRunsError(f"it needs {len(missing)} runs of the stage before it, the first {missing[0]}; do those first")
    return [read_json(file_of(out, one)) for one in wanted]


class Images:
    """The image sets of this process, each read once, and the same as all other runs in `out` had."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._read: dict[tuple[Any, ...], tuple[ImageSet, str]] = {}

    def of(self, config: Config) -> tuple[ImageSet, str]:
        """The images, on the device of the run, and their fingerprint."""
        key = (config.data, config.image_size, tuple(config.classes or ()), config.device)
        if key not in self._read:
            data = read(config)
            self._read[key] = move(data, config.resolved_device()), digest(data)
            name = f"{Path(config.data).name}-{config.image_size}"
            fingerprint = {"digest": self._read[key][1]}
            same(self._out / "images" / f"{name}.json", fingerprint, "--photos must be the images that --out began with")
        return self._read[key]


def _do(one: Run, images: Images, out: Path, progress: Progress) -> None:
    data, fingerprint = images.of(one.config)
    chosen = split(data.labels.cpu(), data.classes, one.config, one.seed)
    checkpoint = out / "models" / f"{one.name}.pt"
    task = progress.add_task("training", total=one.config.epochs, note="")
    started = time.perf_counter()
    trained = train(one.config, one.config.routers[0], one.seed, data, chosen, checkpoint, lambda row: progress.advance(task))
    progress.remove_task(task)
    write_json(file_of(out, one), record(one, trained, data, chosen, fingerprint, time.perf_counter() - started))
    checkpoint.unlink(missing_ok=True)
    console.print(f"done: {one.name}", markup=False, highlight=False)


def record(one: Run, trained: Trained, data: ImageSet, chosen: Split, fingerprint: str, seconds: float) -> Record:
    """What is kept of a trained network and of its one-shot updates."""
    members = getattr(chosen, one.within).to(data.images.device)
    logits, weights = predict(trained.model, data.images[members])
    measured = routing.measure(weights, data.labels[members], data.classes)
    if one.seed >= PICTURED:
        del measured["path_counts"]
    results: Record = {
        "stage": one.stage,
        "phase": one.phase,
        "arm": one.arm,
        "seed": one.seed,
        "config": dataclasses.asdict(one.config) | {"data": None, "device": None},  # places differ from machine to machine
        "data": {
            "digest": fingerprint,
            "classes": data.classes,
            "images": len(chosen.train) + len(chosen.val) + len(chosen.test),
        },
        "device": torch.cuda.get_device_name() if data.images.is_cuda else "cpu",
        "versions": versions(),
        "training_seconds": seconds,
        "accuracy": accuracy(logits, data.labels[members]),
        "routing": measured,
        **spectra(trained.model),
        "val_accuracy": [row["val_accuracy"] for row in trained.history],
        "task": [row["task"] for row in trained.history],
        "oneshot": [],
    }
    asked = adapt_stacked(one.config, one.seed, trained, data, chosen, one.rules, one.within) if one.rules else []
    for rule, of_rule in zip(one.rules, asked, strict=True):
        summary = oneshot.summarize(of_rule, data.classes)
        results.setdefault("gradient_norm", summary["gradient_norm"])  # of the update before any rule: the same for all
        del summary["gradient_norm"]
        results["oneshot"].append({**rule._asdict(), **summary})
    return results
