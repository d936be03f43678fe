"""Every flag: one dataclass field each, with its default, its explanation and its rule; and the arms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from examples.image_classification import config as image_config
from examples.shared.command import Options, add_flags, add_place, flag, parser, require, settle

if TYPE_CHECKING:
    import torch


class Arm(NamedTuple):
    """What holds the gate, and whether its logits are noisy in training (not under hard constraints, as in the public code)."""

    moe: bool = True
    noise: bool = False
    loss: str | None = None  # "importance" or "kl": a term of the loss
    constraint: str | None = None  # "relative" or "mean": closes overused experts


ARMS = {
    "plain": Arm(moe=False),
    "none": Arm(noise=True),
    "quiet": Arm(),  # the hard arms but for their constraint
    "importance": Arm(noise=True, loss="importance"),
    "kl": Arm(noise=True, loss="kl"),
    "relative": Arm(constraint="relative"),
    "mean": Arm(constraint="mean"),
}
IMAGE_SIZES = {"mnist": 16, "cifar10": 32}
FOLDER_SIZE = 64
# below these the maps of the last stage are a single pixel, and batch norm cannot train on an expert's only image
SMALLEST_IMAGE = {"small": 9, "imagenet": 33}


@dataclass(frozen=True)
class Config:
    data: str = flag("mnist", "mnist (embedded, no network), cifar10 (downloads), or a folder with one subfolder a class")
    classes: list[str] | None = flag(None, "use these classes only (default: all)", nargs="+", type=str)
    image_size: int | None = flag(None, "side in pixels (default: mnist 16, cifar10 32, folder 64)", type=int)
    samples_per_class: int | None = flag(
        None, "images a class to split 70/15/15 (default: all that the smallest class has)", type=int
    )
    augment: str | None = flag(None, "none, shift, or flip (shift and mirror) (default: mnist shift, else flip)", type=str)

    arms: list[str] = flag(tuple(ARMS), f"any of: {', '.join(ARMS)} (default: all)", nargs="+", type=str)
    width: int = flag(16, "planes of the first stage; ResNet-18 has 64")
    stem: str = flag("small", "small (3x3 convolution) or imagenet (7x7 with stride 2, then max-pooling)")
    position: int = flag(4, "the stage that is replaced by experts, 1 ... 4")
    experts: int = flag(4, "K, experts")
    top_k: int = flag(2, "experts an image")
    inner_planes: int | None = flag(
        None, "inner planes of an expert (default: so that the parameters stay near those of the plain network)", type=int
    )
    gate: str = flag("gap-fc", "gap-fc (average pooling, linear) or conv (3x3 convolution, ReLU, average pooling, linear)")
    dispatch: str = flag(
        "routed", "routed (an expert runs on its images only) or all (on every image: no waiting for the GPU, more work)"
    )

    soft_coef: float = flag(0.5, "coefficient of the importance loss and of the KL loss")
    relative_bound: float = flag(0.5, "bound of the relative importance constraint")
    mean_bound: float = flag(0.1, "bound of the mean importance constraint")

    seeds: int = flag(2, "how many seeds, 0 ... seeds-1; each draws its own split, initial weights and batches")
    epochs: int = flag(12, "epochs of training; the last epoch's model is used")
    batch_size: int = flag(64, "images a step")
    lr: float = flag(1e-3, "learning rate, Adam; divided by 10 after 80/150 and again after 120/150 of the epochs")

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", list(self.arms))

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        for name, least in (("width", 1), ("experts", 2), ("seeds", 1), ("epochs", 1), ("batch_size", 2)):
            require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        require(self.inner_planes is None or self.inner_planes >= 1, "inner_planes", "at least 1", self.inner_planes)
        samples = self.samples_per_class
        require(samples is None or samples >= 8, "samples_per_class", "at least 8", samples)
        require(1 <= self.position <= 4, "position", "between 1 and 4", self.position)
        require(1 <= self.top_k <= self.experts, "top_k", f"between 1 and the number of experts, {self.experts}", self.top_k)
        choices = {
            "augment": (None, "none", "shift", "flip"),
            "stem": tuple(SMALLEST_IMAGE),
            "gate": ("gap-fc", "conv"),
            "dispatch": ("routed", "all"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, name, "one of " + ", ".join(filter(None, allowed)), value)
        least = SMALLEST_IMAGE[self.stem]
        require(self.side() >= least, "image_size", f"at least {least} with --stem {self.stem}", self.side())
        self.images().check_image_size()
        require(0 < self.lr < math.inf, "lr", "a finite number above 0", self.lr)
        for name in ("soft_coef", "relative_bound", "mean_bound"):
            require(0 <= getattr(self, name) < math.inf, name, "a finite number of at least 0", getattr(self, name))
        for arm in self.arms:
            require(arm in ARMS, "arms", "any of " + ", ".join(ARMS), arm)
        require(len(set(self.arms)) == len(self.arms), "arms", "each named once", " ".join(self.arms))

    def side(self) -> int:
        """Of the images, in pixels."""
        return self.image_size or IMAGE_SIZES.get(self.data, FOLDER_SIZE)

    def images(self) -> image_config.Config:
        """What the loader of `examples.image_classification` is asked for."""
        return image_config.Config(
            data=self.data,
            classes=self.classes or ([str(digit) for digit in range(10)] if self.data == "mnist" else None),
            image_size=self.side(),
            samples_per_class=self.samples_per_class,
            novel=0,
            augment=self.augment,
        )

    def resolved_device(self) -> torch.device:
        return image_config.Config(device=self.device).resolved_device()


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m studies.cnn_experts",
        "Train a ResNet-18 with one stage replaced by sparsely gated convolutional experts (arXiv:2204.10598), "
        "under soft and hard constraints on the gate; leave tables, verdicts on the paper's claims, pictures and results.json "
        "in --out.",
    )
    add_flags(flags, Config)
    add_place(flags, "runs/cnn_experts")
    return settle(Config, vars(flags.parse_args(arguments)))
