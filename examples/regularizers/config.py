"""Every flag of the two studies: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from examples.image_classification import config as images
from examples.image_classification.config import ExperimentError, Options

from .arms import ARMS, BASE

DIGITS = [str(digit) for digit in range(10)]
# where the two studies differ; why, says the package's docstring
STUDIES: dict[str, dict[str, Any]] = {
    "norm": {"batch_norm": False, "lr": 0.05, "weight_decay": 0.0},
    "energy": {"batch_norm": True, "lr": 0.1, "weight_decay": 5e-4},
}
HELP = {
    "norm": "spectral norm regularization (arXiv:1705.10941): gap between training and test, sensitivity to the input",
    "energy": "minimum hyperspherical energy, plain and compressive (arXiv:1805.09298, 1906.04892): test accuracy",
}


def _flag(default: Any, help: str, kind: type | None = None) -> Any:
    metadata = {"help": help, "type": kind or type(default)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata | {"nargs": "+"})
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    study: str  # norm or energy
    arms: list[str]
    batch_norm: bool = field(metadata={"help": "batch norm after each convolution", "type": bool})
    lr: float = field(metadata={"help": "learning rate of SGD at the start", "type": float})
    weight_decay: float = field(metadata={"help": "weight decay of the matrices in every arm", "type": float})

    data: str = _flag("mnist", "mnist (embedded, no network), cifar10 (downloads), or a folder with one subfolder a class")
    classes: list[str] | None = field(default=None, metadata={"help": "use these classes only", "type": str, "nargs": "+"})
    image_size: int | None = _flag(None, "side in pixels (default: mnist 28, cifar10 32, folder 64)", int)
    train_per_class: int = _flag(100, "images a class to train on")
    val_per_class: int = _flag(100, "images a class to choose coefficients by; what is left is for the test")

    widths: list[int] = _flag([16, 32, 64], "channels of the convolutions", int)
    epochs: int = _flag(30, "epochs of training; the last epoch's network is used")
    batch_size: int = _flag(100, "images a step")
    momentum: float = _flag(0.9, "momentum of SGD")

    multiples: list[float] = _flag(
        [0.01, 0.1, 1.0, 10.0, 100.0], "the grid: each arm's published coefficient times these", float
    )
    tuning_seeds: list[int] = _flag([100, 101], "seeds by which coefficients are chosen", int)
    seeds: int = _flag(10, "how many seeds are reported, 0 ... seeds-1")
    noise: list[float] = _flag([0.25, 0.5, 0.75, 1.0], "standard deviations of input noise; pixels are in [-1, 1]", float)
    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, ...")

    def source(self) -> images.Config:
        """What the image example needs in order to load the same images."""
        classes = self.classes or (DIGITS if self.data == "mnist" else None)
        return images.Config(data=self.data, classes=classes, image_size=self.image_size, device=self.device)

    def resolved_device(self) -> torch.device:
        return self.source().resolved_device()

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        for name in ("train_per_class", "val_per_class", "epochs", "seeds"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        _require(self.image_size is None or self.image_size >= 8, "image_size", "at least 8", self.image_size)
        _require(len(self.widths) >= 2 and min(self.widths) >= 1, "widths", "two or more numbers of at least 1", self.widths)
        _require(0 < self.lr < math.inf, "lr", "a finite number above 0", self.lr)
        _require(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number of at least 0", self.weight_decay)
        _require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)
        for name in ("multiples", "noise"):
            values = getattr(self, name)
            _require(all(0 < value < math.inf for value in values), name, "finite numbers above 0", values)
        for name in ("multiples", "noise", "tuning_seeds", "arms"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), name, "different from each other", values)
        free = all(seed >= self.seeds for seed in self.tuning_seeds)
        _require(
            free, "tuning_seeds", f"none of the {self.seeds} seeds that are reported, 0 to {self.seeds - 1}", self.tuning_seeds
        )
        known = ARMS[self.study]
        for arm in self.arms:
            _require(arm in known, "arms", "any of " + ", ".join(known), arm)
        _require(BASE in self.arms, "arms", f"a list with {BASE}, which the others are compared with", self.arms)


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m examples.regularizers",
        allow_abbrev=False,
        description="Train small networks with and without a penalty on their weights, and say which claims of the papers the "
        "paired differences over seeds show. Leaves tables.md, figures and results.json in --out.",
    )
    commands = parser.add_subparsers(dest="study", required=True)
    for study, defaults in STUDIES.items():
        command = commands.add_parser(study, help=HELP[study], description=HELP[study], allow_abbrev=False)
        command.add_argument(
            "--arms", nargs="+", default=list(ARMS[study]), help=f"any of: {', '.join(ARMS[study])} (default: all)"
        )
        for item in dataclasses.fields(Config)[2:]:
            _add(command, item, defaults)
        command.add_argument(
            "--out",
            type=Path,
            default=Path("runs/regularizers") / study,
            help="folder of the results (default: %(default)s)",
        )
        again = command.add_mutually_exclusive_group()
        again.add_argument("--resume", action="store_true", help="continue the study in --out where it stopped")
        again.add_argument("--overwrite", action="store_true", help="delete the study in --out first")
    given = vars(parser.parse_args(arguments))
    where = Options(given.pop("out"), given.pop("resume"), given.pop("overwrite"))
    config = Config(**given)
    config.validate()
    return config, where


def _add(command: argparse.ArgumentParser, item: dataclasses.Field[Any], defaults: dict[str, Any]) -> None:
    options = dict(item.metadata)
    default = defaults.get(item.name, item.default)
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    text = options.pop("help")
    if "(default:" not in text:
        shown = " ".join(map(str, default)) if isinstance(default, list) else "all" if default is None else default
        text += f" (default: {shown})"
    name = "--" + item.name.replace("_", "-")
    if options["type"] is bool:
        command.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)
    else:
        command.add_argument(name, default=default, help=text, **options)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        raise ExperimentError(f"--{name.replace('_', '-')} must be {rule}, got {shown}")
