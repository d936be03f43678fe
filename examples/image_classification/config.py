"""Every flag of the experiment: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_router.functional import spectral_rank_penalty

from .terms import BALANCES, CONTROLLERS, INPLACE, PENALTIES


class ExperimentError(Exception):
    """Bad input or a failing disk: one sentence for the user, no traceback."""


class RouterSpec(NamedTuple):
    gate: str  # "linear" or "prototype"
    balance: bool  # what --balance names: by default beta * L_div in the loss
    spectral: bool  # what --penalty names: by default alpha * (L_sn + L_rank) in the loss


# Whether the paper's baseline and clustering rows used L_div is not said; the controls tell its effect from the gate's.
ROUTERS = {
    "baseline": RouterSpec("linear", balance=False, spectral=False),
    "clustering": RouterSpec("prototype", balance=True, spectral=False),
    "spectral": RouterSpec("prototype", balance=True, spectral=True),
    "baseline+balance": RouterSpec("linear", balance=True, spectral=False),
    "baseline+spectral": RouterSpec("linear", balance=False, spectral=True),
    "clustering-balance": RouterSpec("prototype", balance=False, spectral=False),
}

# The paper's set-ups. It prints neither image size nor epochs; those stay at the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"samples_per_class": 525, "layers": 2, "experts": 2},
    "table1": {"samples_per_class": 1600, "layers": 2, "experts": 2},
    "table2": {"samples_per_class": 1600, "layers": 4, "experts": 4},
}


def _number_or(word: str) -> Any:
    def parse(text: str) -> float | str:
        return word if text == word else float(text)

    parse.__name__ = f"number or {word!r}"  # argparse names the type in its message
    return parse


def _flag(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Config:
    data: str = _flag("mnist", "mnist (embedded, no network), cifar10 (downloads), or a folder with one subfolder a class")
    classes: list[str] | None = _flag(None, "use these classes only (default: mnist 3 5 8 9, else all)", nargs="+", type=str)
    image_size: int | None = _flag(None, "side in pixels (default: mnist 28, cifar10 32, folder 64)", type=int)
    samples_per_class: int | None = _flag(
        None, "images a class to split 70/15/15 (default: all that the smallest class has)", type=int
    )
    novel: int = _flag(25, "images a class held out for the one-shot test")
    augment: str | None = _flag(None, "none, shift, or flip (shift and mirror) (default: mnist shift, else flip)", type=str)

    layers: int = _flag(2, "N, MoE layers")
    experts: int = _flag(2, "K, experts a layer")
    dim: int = _flag(64, "d, width between layers")
    hidden: int = _flag(128, "hidden width of an expert")
    stem_norm: str = _flag("batch", "normalisation in the stem: batch or none (deep nets then stay at chance for long)")

    routers: list[str] = _flag(("baseline", "clustering", "spectral"), f"any of: {', '.join(ROUTERS)}", nargs="+", type=str)
    temperature: float | str = _flag(
        "auto", 'tau of the prototype routers, or "auto": scores of standard deviation 1 at the start', type=_number_or("auto")
    )
    metric: str = _flag("euclidean", "score of the prototype routers: euclidean, sqeuclidean, cosine, dot")
    penalty: str = _flag("rank", f"what the spectral routers have: {', '.join((*PENALTIES, *INPLACE))}; docs/comparison.md")
    balance: str = _flag("cv2", f"what the balanced routers have: {', '.join((*BALANCES, *CONTROLLERS))}")
    alpha: float = _flag(0.01, "coefficient of the penalty")
    beta: float = _flag(0.1, "coefficient of the balance loss, summed over layers")
    sigma_target: float | str = _flag(1.0, 'target of the spectral norm, or "initial"', type=_number_or("initial"))
    rank_target: float | None = _flag(None, "target of the stable rank (default: min(experts, dim))", type=float)
    relative: bool = _flag(False, "divide the penalty's deviations by their targets")

    bound: float = _flag(0.5, "of the constraints, relative and mean: excess of importance above which an expert is closed")
    bias_rate: float = _flag(1e-3, "of the loss-free bias: its change a step")

    seeds: int = _flag(3, "how many seeds, 0 ... seeds-1; each draws its own split, initial weights and batches")
    epochs: int = _flag(12, "epochs of training; the last epoch's model is used")
    batch_size: int = _flag(64, "images a step")
    lr: float = _flag(1e-3, "learning rate of training, Adam")

    scope: str = _flag("all", "what a one-shot update may change: all, experts, path (the novel image's winning experts)")
    oneshot_optimizer: str = _flag("adam", "adam or sgd")
    oneshot_lr: float = _flag(1e-4, "learning rate of the one-shot update")
    oneshot_steps: int = _flag(1, "steps of the one-shot update")
    anchor: int = _flag(16, "training images beside the novel one in the one-shot update")

    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, ...")
    compile: bool = _flag(False, "torch.compile the training step")

    def __post_init__(self) -> None:
        object.__setattr__(self, "routers", list(self.routers))

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        for name in ("layers", "experts", "dim", "hidden", "seeds", "epochs", "batch_size", "novel", "oneshot_steps"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        _require(self.anchor >= 0, "anchor", "at least 0", self.anchor)
        for name in ("image_size", "samples_per_class"):
            value = getattr(self, name)
            _require(value is None or value >= 8, name, "at least 8", value)
        for name in ("lr", "oneshot_lr", "bias_rate"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), name, "a finite number above 0", value)
        for name in ("alpha", "beta", "bound"):
            _require(0 <= getattr(self, name) < float("inf"), name, "a finite number of at least 0", getattr(self, name))
        choices = {
            "scope": ("all", "experts", "path"),
            "oneshot_optimizer": ("adam", "sgd"),
            "augment": (None, "none", "shift", "flip"),
            "stem_norm": ("batch", "none"),
            "penalty": (*PENALTIES, *INPLACE),
            "balance": (*BALANCES, *CONTROLLERS),
            "metric": ("euclidean", "sqeuclidean", "cosine", "dot"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, "one of " + ", ".join(filter(None, allowed)), value)
        for router in self.routers:
            _require(router in ROUTERS, "routers", "any of " + ", ".join(ROUTERS), router)
        _require(len(set(self.routers)) == len(self.routers), "routers", "each named once", " ".join(self.routers))
        if self.penalty == "project":
            _require(
                not isinstance(self.sigma_target, str), "sigma_target", "a number for --penalty project", self.sigma_target
            )
        if not isinstance(self.temperature, str):
            _require(0 < self.temperature < float("inf"), "temperature", 'a finite number above 0, or "auto"', self.temperature)
        try:
            sigma_target = 1.0 if isinstance(self.sigma_target, str) else self.sigma_target
            spectral_rank_penalty(torch.zeros(self.experts, self.dim), sigma_target, self.rank_target, relative=self.relative)
        except ValueError as error:
            raise ExperimentError(f"{error} (--sigma-target, --rank-target, --experts, --dim)") from None

    def resolved_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            _require(device.type in ("cpu", "cuda"), "device", "one that PyTorch can use here: auto, cpu or cuda", self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ExperimentError(f"--device must be one that PyTorch can use here, got {self.device}: {reason}") from None
        return device


class Options(NamedTuple):
    """Where the results go: no part of the experiment itself."""

    out: Path
    resume: bool
    overwrite: bool


def parser(prog: str, description: str, out: str, without: tuple[str, ...] = (), **defaults: Any) -> argparse.ArgumentParser:
    """A flag for each field of Config but those `without`, with Config's defaults but for `defaults`."""
    flags = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=description)  # --seed 7 must not mean --seeds 7
    for item in dataclasses.fields(Config):
        if item.name in without:
            continue
        options = dict(item.metadata)
        text = options.pop("help")
        default = defaults.get(item.name, item.default)
        if "(default:" not in text:
            text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        text = text.replace("%", "%%")
        name = "--" + item.name.replace("_", "-")
        if isinstance(default, bool):
            flags.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            options.setdefault("type", type(default))
            flags.add_argument(name, default=argparse.SUPPRESS, help=text, **options)
    flags.add_argument("--out", type=Path, default=Path(out), help="folder of the results (default: %(default)s)")
    again = flags.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    return flags


def settle(given: dict[str, Any], **defaults: Any) -> tuple[Config, Options]:
    """Config and Options of the flags that were given."""
    where = Options(given.pop("out"), given.pop("resume"), given.pop("overwrite"))
    config = Config(**{**defaults, **given})
    config.validate()
    return config, where


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m examples.image_classification",
        "Train mixture-of-experts image classifiers with the routers of SR-MoE (arXiv:2601.03889), run the paper's "
        "one-shot adaptation test, and leave tables, figures and results.json in --out.",
        "runs/image_classification",
    )
    flags.add_argument(
        "--preset", choices=PRESETS, help="the paper's set-ups, for --data with enough images: " + str(PRESETS).replace("'", "")
    )
    given = vars(flags.parse_args(arguments))
    preset = given.pop("preset")
    return settle(given, **(PRESETS[preset] if preset else {}))


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ExperimentError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
