"""Every flag: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from examples.shared.command import Options, add_flags, add_place, flag, parser, require, settle

ARCHITECTURES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss")
SCOPES = ("all", "experts", "path")
ARMS = ("none", "own", "penalty", "balance", "both", "ernie")
FINETUNING = ("none", "spread", "hold", "balance", "both", "hold+balance")
REPORTERS = ("none", "tensorboard", "wandb")


def _initial_or_number(text: str) -> float | str:
    return text if text == "initial" else float(text)


_initial_or_number.__name__ = "number or 'initial'"  # argparse names the type in its message


@dataclass(frozen=True)
class Config:
    known_arms: ClassVar[tuple[str, ...]] = ARMS

    dataset: str = flag(
        "embedded",
        "embedded (text that comes with Python), a text file, a folder with one subfolder a domain, or a hub data set",
    )
    text_column: str = flag("text", "of a hub data set: the column of the text")
    domain_column: str | None = flag(None, "of a hub data set: the column of the domain (default: one domain)", type=str)
    domain_bytes: int = flag(262144, "training text of a domain, in bytes, at most; a tenth as much for validation")
    sequence: int = flag(128, "tokens a window")
    validation_windows: int = flag(32, "windows of each domain that the measurements are on")

    model: str | None = flag(None, "fine-tune this one: a folder or a hub name (default: a small new model)", type=str)
    architecture: str = flag("mixtral", f"of the new model: {', '.join(ARCHITECTURES)}")
    layers: int = flag(4, "of the new model: layers")
    dim: int = flag(128, "of the new model: width")
    hidden: int = flag(128, "of the new model: hidden width of an expert")
    experts: int = flag(8, "of the new model: experts a layer")
    top_k: int = flag(2, "of the new model: experts a token")

    arms: list[str] = flag(ARMS, f"any of: {', '.join(ARMS)} (default: all)", nargs="+", type=str)
    alpha: float = flag(0.01, "coefficient of the penalty, that of ernie too")
    beta: float = flag(0.01, "coefficient of the balance loss, summed over layers")
    own_coef: float = flag(0.01, "coefficient of the model's own auxiliary loss, in the arm own")
    sigma_target: float | str = flag("initial", 'target of the spectral norm, or "initial"', type=_initial_or_number)

    seeds: int = flag(1, "how many seeds, 0 ... seeds-1; each draws its own initial weights and batches")
    steps: int = flag(400, "steps of training; the last step's model is used")
    batch_size: int = flag(8, "windows a step, over all processes")
    lr: float = flag(1e-3, "learning rate of training, AdamW; warm-up over a tenth of the steps, then a cosine to zero")
    evaluations: int = flag(8, "measurements in training beside the one before it; a checkpoint at each")

    adapt_domain: str | None = flag(None, "domain that training goes on with afterwards (default: the first one)", type=str)
    adapt_steps: int = flag(60, "steps of that; 0 leaves the adaptation test out")
    adapt_lr: float = flag(2e-4, "its learning rate, constant after a warm-up over a quarter of the steps")
    adapt_evaluations: int = flag(6, "measurements in the adaptation beside the one before it")
    adapt_scope: str = flag("all", "what may change in it: all; experts, all of them; path, the experts that take the domain")
    adapt_share: float = flag(0.5, "of --adapt-scope path: the share of the domain's tokens that the experts of a layer take")

    device: str = flag("auto", "auto, cpu or cuda")
    bf16: bool = flag(False, "bf16 autocast")
    compile: bool = flag(False, "torch.compile the model, hooks and all")
    fsdp: bool = flag(False, "under torchrun or accelerate launch: FSDP2 in place of DDP")
    report_to: list[str] = flag(
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
            require(getattr(self, name) >= bound, name, f"at least {bound}", getattr(self, name))
        require(self.dim % 8 == 0, "dim", "a multiple of 8 (four heads of even width)", self.dim)
        require(1 <= self.top_k <= self.experts, "top_k", f"between 1 and the number of experts, {self.experts}", self.top_k)
        require(self.evaluations <= self.steps, "evaluations", f"at most --steps, {self.steps}", self.evaluations)
        if self.adapt_steps:
            rule = f"at most --adapt-steps, {self.adapt_steps}"
            require(self.adapt_evaluations <= self.adapt_steps, "adapt_evaluations", rule, self.adapt_evaluations)
        require(0 < self.adapt_share <= 1, "adapt_share", "above 0 and at most 1", self.adapt_share)
        for name in ("lr", "adapt_lr"):
            require(0 < getattr(self, name) < math.inf, name, "a finite number above 0", getattr(self, name))
        for name in ("alpha", "beta", "own_coef"):
            require(0 <= getattr(self, name) < math.inf, name, "a finite number of at least 0", getattr(self, name))
        target = self.sigma_target
        if not isinstance(target, str):
            require(0 < target < math.inf, "sigma_target", 'a finite number above 0, or "initial"', target)
        choices: dict[str, tuple[str, ...]] = {"architecture": ARCHITECTURES, "device": ("auto", "cpu", "cuda")}
        choices["adapt_scope"] = SCOPES
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, "one of " + ", ".join(allowed), getattr(self, name))
        lists: dict[str, tuple[str, ...]] = {"arms": self.known_arms, "report_to": REPORTERS}
        for name, allowed in lists.items():
            values = getattr(self, name)
            for value in values:
                require(value in allowed, name, "any of " + ", ".join(allowed), value)
            require(len(set(values)) == len(values), name, "each named once", " ".join(values))
        for name in self.report_to:
            installed = name == "none" or find_spec(name) is not None
            require(installed, "report_to", f"installed (`pip install {name}`)", name)
        alone = "none" not in self.report_to or len(self.report_to) == 1
        require(alone, "report_to", "none, or reporters", " ".join(self.report_to))
        require(self.device != "cuda" or _cuda(), "device", "one that PyTorch can use here", self.device)
        ranks = processes()
        require(self.batch_size % ranks == 0, "batch_size", f"a multiple of the number of processes, {ranks}", self.batch_size)
        whole = not self.fsdp or self.adapt_scope == "all"  # Trainer shards when it begins, and the path is of parameters
        require(whole, "adapt_scope", "all under --fsdp", self.adapt_scope)
        require(not self.fsdp or ranks > 1, "fsdp", "used with several processes (torchrun, accelerate launch)", "one process")

    def resolved_device(self) -> str:
        return self.device if self.device != "auto" else "cuda" if _cuda() else "cpu"


def _cuda() -> bool:
    import torch  # not before it is needed: flags and their help do without

    return torch.cuda.is_available()


def processes() -> int:
    """How many torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m examples.transformer_moe",
        "Train mixture-of-experts language models of transformers with its Trainer, with and without the router "
        "penalties of wrap_moe; leave tables, pictures, models and results.json in --out.",
    )
    add_flags(flags, Config)
    add_place(flags, "runs/transformer_moe")
    return settle(Config, vars(flags.parse_args(arguments)))
