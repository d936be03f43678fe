"""Every flag: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from examples.image_classification.config import ExperimentError, Options

ARCHITECTURES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
ARMS = ("none", "own", "penalty", "balance", "both", "ernie")
REPORTERS = ("none", "tensorboard", "wandb")


def _initial_or_number(text: str) -> float | str:
    return text if text == "initial" else float(text)


_initial_or_number.__name__ = "number or 'initial'"  # argparse names the type in its message


def _flag(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Config:
    dataset: str = _flag(
        "embedded",
        "embedded (text that comes with Python), a text file, a folder with one subfolder a domain, or a hub data set",
    )
    text_column: str = _flag("text", "of a hub data set: the column of the text")
    domain_column: str | None = _flag(None, "of a hub data set: the column of the domain (default: one domain)", type=str)
    domain_bytes: int = _flag(262144, "training text of a domain, in bytes, at most; a tenth as much for validation")
    sequence: int = _flag(128, "tokens a window")
    validation_windows: int = _flag(32, "windows of each domain that the measurements are on")

    model: str | None = _flag(None, "fine-tune this one: a folder or a hub name (default: a small new model)", type=str)
    architecture: str = _flag("mixtral", f"of the new model: {', '.join(ARCHITECTURES)}")
    layers: int = _flag(4, "of the new model: layers")
    dim: int = _flag(128, "of the new model: width")
    hidden: int = _flag(128, "of the new model: hidden width of an expert")
    experts: int = _flag(8, "of the new model: experts a layer")
    top_k: int = _flag(2, "of the new model: experts a token")

    arms: list[str] = _flag(ARMS, f"any of: {', '.join(ARMS)} (default: all)", nargs="+", type=str)
    alpha: float = _flag(0.01, "coefficient of the penalty, that of ernie too")
    beta: float = _flag(0.01, "coefficient of the balance loss, summed over layers")
    own_coef: float = _flag(0.01, "coefficient of the model's own auxiliary loss, in the arm own")
    sigma_target: float | str = _flag("initial", 'target of the spectral norm, or "initial"', type=_initial_or_number)

    seeds: int = _flag(1, "how many seeds, 0 ... seeds-1; each draws its own initial weights and batches")
    steps: int = _flag(400, "steps of training; the last step's model is used")
    batch_size: int = _flag(8, "windows a step, over all processes")
    lr: float = _flag(1e-3, "learning rate of training, AdamW; warm-up over a tenth of the steps, then a cosine to zero")
    evaluations: int = _flag(8, "measurements in training beside the one before it; a checkpoint at each")

    adapt_domain: str | None = _flag(None, "domain that training goes on with afterwards (default: the first one)", type=str)
    adapt_steps: int = _flag(60, "steps of that; 0 leaves the adaptation test out")
    adapt_lr: float = _flag(2e-4, "its learning rate, constant after a warm-up over a quarter of the steps")
    adapt_evaluations: int = _flag(6, "measurements in the adaptation beside the one before it")

    device: str = _flag("auto", "auto, cpu or cuda")
    bf16: bool = _flag(False, "bf16 autocast")
    fsdp: bool = _flag(False, "under torchrun or accelerate launch: FSDP2 in place of DDP")
    report_to: list[str] = _flag(
        ("tensorboard",),
        "reporters of Trainer: none, tensorboard, wandb (default: tensorboard)",
        nargs="+",
        type=str,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", list(self.arms))
        object.__setattr__(self, "report_to", list(self.report_to))

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        least = {"domain_bytes": 1024, "sequence": 2, "validation_windows": 1, "layers": 1, "dim": 8, "hidden": 1, "experts": 2}
        least |= {"seeds": 1, "steps": 1, "batch_size": 1, "evaluations": 1, "adapt_steps": 0, "adapt_evaluations": 1}
        for name, bound in least.items():
            _require(getattr(self, name) >= bound, name, f"at least {bound}", getattr(self, name))
        _require(self.dim % 8 == 0, "dim", "a multiple of 8 (four heads of even width)", self.dim)
        _require(1 <= self.top_k <= self.experts, "top_k", f"between 1 and the number of experts, {self.experts}", self.top_k)
        _require(self.evaluations <= self.steps, "evaluations", f"at most --steps, {self.steps}", self.evaluations)
        if self.adapt_steps:
            rule = f"at most --adapt-steps, {self.adapt_steps}"
            _require(self.adapt_evaluations <= self.adapt_steps, "adapt_evaluations", rule, self.adapt_evaluations)
        for name in ("lr", "adapt_lr"):
            _require(0 < getattr(self, name) < math.inf, name, "a finite number above 0", getattr(self, name))
        for name in ("alpha", "beta", "own_coef"):
            _require(0 <= getattr(self, name) < math.inf, name, "a finite number of at least 0", getattr(self, name))
        target = self.sigma_target
        if not isinstance(target, str):
            _require(0 < target < math.inf, "sigma_target", 'a finite number above 0, or "initial"', target)
        choices: dict[str, tuple[str, ...]] = {"architecture": ARCHITECTURES, "device": ("auto", "cpu", "cuda")}
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, "one of " + ", ".join(allowed), getattr(self, name))
        lists: dict[str, tuple[str, ...]] = {"arms": ARMS, "report_to": REPORTERS}
        for name, allowed in lists.items():
            values = getattr(self, name)
            for value in values:
                _require(value in allowed, name, "any of " + ", ".join(allowed), value)
            _require(len(set(values)) == len(values), name, "each named once", " ".join(values))
        for name in self.report_to:
            installed = name == "none" or find_spec(name) is not None
            _require(installed, "report_to", f"installed (`pip install {name}`)", name)
        alone = "none" not in self.report_to or len(self.report_to) == 1
        _require(alone, "report_to", "none, or reporters", " ".join(self.report_to))
        _require(self.device != "cuda" or torch.cuda.is_available(), "device", "one that PyTorch can use here", self.device)
        ranks = processes()
        _require(self.batch_size % ranks == 0, "batch_size", f"a multiple of the number of processes, {ranks}", self.batch_size)
        _require(not self.fsdp or ranks > 1, "fsdp", "used with several processes (torchrun, accelerate launch)", "one process")

    def resolved_device(self) -> str:
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def processes() -> int:
    """How many torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m examples.transformer_moe",
        allow_abbrev=False,  # --seed 7 must not mean --seeds 7
        description="Train mixture-of-experts language models of transformers with its Trainer, with and without the router "
        "penalties of wrap_moe; leave tables, pictures, models and results.json in --out.",
    )
    for item in dataclasses.fields(Config):
        options = dict(item.metadata)
        text = options.pop("help")
        if "(default:" not in text:
            text += f" (default: {item.default})"
        name = "--" + item.name.replace("_", "-")
        if isinstance(item.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            options.setdefault("type", type(item.default))
            parser.add_argument(name, default=argparse.SUPPRESS, help=text, **options)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/transformer_moe"), help="folder of the results (default: %(default)s)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    again.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    given = vars(parser.parse_args(arguments))
    where = Options(given.pop("out"), given.pop("resume"), given.pop("overwrite"))
    config = Config(**given)
    config.validate()
    return config, where


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ExperimentError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
