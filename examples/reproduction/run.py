"""Do the runs of the protocol, any number of processes side by side: each takes the next run that nobody has begun.

A run that is done is a file in OUT/parts; what is left of a killed one is its model after the last whole epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from examples.image_classification import oneshot, routing
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, digest, split
from examples.image_classification.stacked import adapt_stacked
from examples.image_classification.study import move, read
from examples.image_classification.train import Trained, accuracy, predict, spectra, train
from examples.shared.progress import bars, console
from examples.shared.runs import versions
from examples.shared.storage import read_json, write_json

from . import choice
from .protocol import STAGES, Protocol, Run, Settings, runs

WAIT = 3.0  # seconds between looks at what other processes have still to finish
PICTURED = 3  # seeds whose table of paths is kept
Record = dict[str, Any]


def study(protocol: Protocol, places: dict[str, str], out: Path, stages: tuple[str, ...] = STAGES, only: str = "") -> None:
    """Do what is left of the stages, in their order; of their runs those whose name contains `only`."""
    images = Images()
    with bars() as progress:
        for stage in stages:
            arms = _arms(protocol, stage, places, out)
            if arms == {}:  # depends on data that are not there
                continue
            wanted = [one for one in runs(protocol, stage, places, arms) if only in one.name]
            task = progress.add_task(stage, total=len(wanted), note="")
            for one in wanted:
                progress.update(task, note=one.name)
                with claim(out, one) as mine:
                    if mine:
                        _do(one, images, out, progress)
                progress.advance(task)
            progress.remove_task(task)


def _arms(protocol: Protocol, stage: str, places: dict[str, str], out: Path) -> dict[str, Settings] | None:
    """The arms of a stage that earlier ones decide; waits for those. {} where the earlier stages cannot be run here."""
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


def _all(wanted: list[Run], out: Path) -> list[Record]:
    """The records of these runs, once all are there."""
    told = False
    while missing := [one for one in wanted if not _file(out, one).exists()]:
        if not told:
            console.print(f"waiting for {len(missing)} runs, the first {missing[0].name}: another process must finish them")
            told = True
        time.sleep(WAIT)
    return [read_json(_file(out, one)) for one in wanted]


def records(out: Path) -> list[Record]:
    """All that is saved, sorted by name."""
    return [read_json(file) for file in sorted((out / "parts").glob("*.json"))]


def _file(out: Path, one: Run) -> Path:
    return out / "parts" / f"{one.name}.json"


@contextlib.contextmanager
def claim(out: Path, one: Run) -> Iterator[bool]:
    """Whether this process is the one to do the run. The claim ends with the process, however that ends."""
    if _file(out, one).exists():
        yield False
        return
    lock = out / "locks" / one.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        yield _lock(handle.fileno()) and not _file(out, one).exists()


def _lock(descriptor: int) -> bool:
    if os.name != "posix":  # without locks one process works alone
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Images:
    """The image sets of this process, each read once."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], tuple[ImageSet, str]] = {}

    def of(self, config: Config) -> tuple[ImageSet, str]:
        """The images, on the device of the run, and their fingerprint."""
        key = (config.data, config.image_size, tuple(config.classes or ()), config.device)
        if key not in self._read:
            data = read(config)
            self._read[key] = move(data, config.resolved_device()), digest(data)
        return self._read[key]


def _do(one: Run, images: Images, out: Path, progress: Progress) -> None:
    data, fingerprint = images.of(one.config)
    chosen = split(data.labels.cpu(), data.classes, one.config, one.seed)
    checkpoint = out / "models" / f"{one.name}.pt"
    task = progress.add_task("training", total=one.config.epochs, note="")
    started = time.perf_counter()
    trained = train(one.config, one.config.routers[0], one.seed, data, chosen, checkpoint, lambda row: progress.advance(task))
    progress.remove_task(task)
    write_json(_file(out, one), record(one, trained, data, fingerprint, time.perf_counter() - started))
    checkpoint.unlink(missing_ok=True)
    console.print(f"done: {one.name}", markup=False, highlight=False)


def record(one: Run, trained: Trained, data: ImageSet, fingerprint: str, seconds: float) -> Record:
    """What is kept of a trained network and of its one-shot updates."""
    chosen = split(data.labels.cpu(), data.classes, one.config, one.seed)
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
    for rule, of_rule in zip(
        one.rules, adapt_stacked(one.config, one.seed, trained, data, chosen, one.rules, one.within), strict=True
    ):
        summary = oneshot.summarize(of_rule, data.classes)
        results.setdefault("gradient_norm", summary["gradient_norm"])  # of the update before any rule: the same for all
        del summary["gradient_norm"]
        results["oneshot"].append({**rule._asdict(), **summary})
    return results
