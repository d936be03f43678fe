"""Every flag of the two studies: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from examples.image_classification import config as images
from examples.shared.command import Options, add_flags, add_place, flag, parser, require, settle

from .arms import ARMS, BASE

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Config:
    study: str  # norm or energy
    arms: list[str]
    batch_norm: bool = field(metadata={"help": "batch norm after each convolution", "type": bool})
    lr: float = field(metadata={"help": "learning rate of SGD at the start", "type": float})
    weight_decay: float = field(metadata={"help": "weight decay of the matrices in every arm", "type": float})

    data: str = flag("mnist", "mnist (embedded, no network), cifar10 (downloads), or a folder with one subfolder a class")
    classes: list[str] | None = field(default=None, metadata={"help": "use these classes only", "type": str, "nargs": "+"})
    image_size: int | None = flag(None, "side in pixels (default: mnist 28, cifar10 32, folder 64)", type=int)
    train_per_class: int = flag(100, "images a class to train on")
    val_per_class: int = flag(100, "images a class to choose coefficients by; what is left is for the test")

    widths: list[int] = flag([16, 32, 64], "channels of the convolutions", type=int)
    epochs: int = flag(30, "epochs of training; the last epoch's network is used")
    batch_size: int = flag(100, "images a step")
    momentum: float = flag(0.9, "momentum of SGD")

    multiples: list[float] = flag(
        [0.01, 0.1, 1.0, 10.0, 100.0], "the grid: each arm's published coefficient times these", type=float
    )
    tuning_seeds: list[int] = flag([100, 101], "seeds by which coefficients are chosen", type=int)
    seeds: int = flag(10, "how many seeds are reported, 0 ... seeds-1")
    noise: list[float] = flag([0.25, 0.5, 0.75, 1.0], "standard deviations of input noise; pixels are in [-1, 1]", type=float)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")

    def source(self) -> images.Config:
        """What the image example needs in order to load the same images."""
        classes = self.classes or (DIGITS if self.data == "mnist" else None)
        return images.Config(data=self.data, classes=classes, image_size=self.image_size, device=self.device)

    def resolved_device(self) -> torch.device:
        return self.source().resolved_device()

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        for name in ("train_per_class", "val_per_class", "epochs", "seeds"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        self.source().check_image_size()
        require(len(self.widths) >= 2 and min(self.widths) >= 1, "widths", "two or more numbers of at least 1", self.widths)
        require(0 < self.lr < math.inf, "lr", "a finite number above 0", self.lr)
        require(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number of at least 0", self.weight_decay)
        require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)
        for name in ("multiples", "noise"):
            values = getattr(self, name)
            require(all(0 < value < math.inf for value in values), name, "finite numbers above 0", values)
        for name in ("multiples", "noise", "tuning_seeds", "arms"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, "different from each other", values)
        free = all(seed >= self.seeds for seed in self.tuning_seeds)
        require(
            free, "tuning_seeds", f"none of the {self.seeds} seeds that are reported, 0 to {self.seeds - 1}", self.tuning_seeds
        )
        known = ARMS[self.study]
        for arm in self.arms:
            require(arm in known, "arms", "any of " + ", ".join(known), arm)
        require(BASE in self.arms, "arms", f"a list with {BASE}, which the others are compared with", self.arms)


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m studies.regularizers",
        "Train small networks with and without a penalty on their weights, and say which claims of the papers the paired "
        "differences over seeds show. Leaves tables.md, figures and results.json in --out.",
    )
    commands = flags.add_subparsers(dest="study", required=True)
    for study, defaults in STUDIES.items():
        command = commands.add_parser(study, help=HELP[study], description=HELP[study], allow_abbrev=False)
        command.add_argument(
            "--arms", nargs="+", default=list(ARMS[study]), help=f"any of: {', '.join(ARMS[study])} (default: all)"
        )
        add_flags(command, Config, ("study", "arms"), defaults)
        add_place(command, f"runs/regularizers/{study}")
    given = vars(flags.parse_args(arguments))
    return settle(Config, given, STUDIES[given["study"]])
