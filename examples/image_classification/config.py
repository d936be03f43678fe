"""Every flag of the experiment: one dataclass field each, with its default, its explanation and its rule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from examples.shared.command import ExperimentError, Options, add_flags, add_place, flag, parser, require, settle

from .terms import BALANCES, CONTROLLERS, INPLACE, PENALTIES

if TYPE_CHECKING:
    import torch

# images lie in memory as they are
LARGEST_IMAGE = 1024


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


@cache  # a study validates thousands of configurations with a handful of targets
def _problem_of_targets(experts: int, dim: int, sigma_target: float, rank_target: Any, relative: bool) -> str | None:
    """What the penalty has against these targets for a gate of this shape; None: nothing."""
    import torch

    from spectral_router.functional import spectral_rank_penalty

    with torch.device("meta"):  # the rules ask for a shape, which may be a huge one
        gate = torch.empty(experts, dim)
    try:
        spectral_rank_penalty(gate, sigma_target, rank_target, relative=relative)
    except ValueError as error:
        return str(error)
    return None


def _number_or(word: str) -> Any:
    def parse(text: str) -> float | str:
        return word if text == word else float(text)

    parse.__name__ = f"number or {word!r}"  # argparse names the type in its message
    return parse


@dataclass(frozen=True)
class Config:
    data: str = flag("mnist", "mnist (embedded, no network), cifar10 (downloads), or a folder with one subfolder a class")
    classes: list[str] | None = flag(None, "use these classes only (default: mnist 3 5 8 9, else all)", nargs="+", type=str)
    image_size: int | None = flag(None, "side in pixels (default: mnist 28, cifar10 32, folder 64)", type=int)
    samples_per_class: int | None = flag(
        None, "images a class to split 70/15/15 (default: all that the smallest class has)", type=int
    )
    novel: int = flag(25, "images a class held out for the one-shot test")
    augment: str | None = flag(None, "none, shift, or flip (shift and mirror) (default: mnist shift, else flip)", type=str)

    layers: int = flag(2, "N, MoE layers")
    experts: int = flag(2, "K, experts a layer")
    dim: int = flag(64, "d, width between layers")
    hidden: int = flag(128, "hidden width of an expert")
    stem_norm: str = flag("batch", "normalisation in the stem: batch or none (deep nets then stay at chance for long)")

    routers: list[str] = flag(("baseline", "clustering", "spectral"), f"any of: {', '.join(ROUTERS)}", nargs="+", type=str)
    temperature: float | str = flag(
        "auto", 'tau of the prototype routers, or "auto": scores of standard deviation 1 at the start', type=_number_or("auto")
    )
    metric: str = flag("euclidean", "score of the prototype routers: euclidean, sqeuclidean, cosine, dot")
    prototypes: str = flag("random", "where prototypes start: random, or data (far apart inputs of their layer, k-means++)")
    residual: bool = flag(False, "add each MoE layer's input to its output; the paper does not")
    penalty: str = flag("rank", f"what the spectral routers have: {', '.join((*PENALTIES, *INPLACE))}; docs/comparison.md")
    balance: str = flag("cv2", f"what the balanced routers have: {', '.join((*BALANCES, *CONTROLLERS))}")
    alpha: float = flag(0.01, "coefficient of the penalty")
    beta: float = flag(0.1, "coefficient of the balance loss, summed over layers")
    sigma_target: float | str = flag(1.0, 'target of the spectral norm, or "initial"', type=_number_or("initial"))
    rank_target: float | None = flag(None, "target of the stable rank (default: min(experts, dim))", type=float)
    relative: bool = flag(False, "divide the penalty's deviations by their targets")

    bound: float = flag(0.5, "of the constraints, relative and mean: excess of importance above which an expert is closed")
    bias_rate: float = flag(1e-3, "of the loss-free bias: its change a step")

    seeds: int = flag(3, "how many seeds, 0 ... seeds-1; each draws its own split, initial weights and batches")
    epochs: int = flag(12, "epochs of training; the last epoch's model is used")
    batch_size: int = flag(64, "images a step")
    lr: float = flag(1e-3, "learning rate of training, Adam")
    gate_lr_scale: float = flag(1.0, "the gates' learning rate, in parts of --lr; 0 leaves them as they are drawn")

    scope: str = flag("all", "what a one-shot update may change: all, experts, path (the novel image's winning experts)")
    oneshot_optimizer: str = flag("adam", "adam or sgd")
    oneshot_lr: float = flag(1e-4, "learning rate of the one-shot update")
    oneshot_steps: int = flag(1, "steps of the one-shot update")
    anchor: int = flag(16, "training images beside the novel one in the one-shot update")

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    compile: bool = flag(False, "torch.compile the training step")

    def __post_init__(self) -> None:
        object.__setattr__(self, "routers", list(self.routers))

    def validate(self) -> None:
        """Raise ExperimentError for the first rule that is broken."""
        for name in ("layers", "experts", "dim", "hidden", "seeds", "epochs", "batch_size", "novel", "oneshot_steps"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two images)", self.batch_size)
        require(self.anchor >= 0, "anchor", "at least 0", self.anchor)
        self.check_image_size()
        samples = self.samples_per_class
        require(samples is None or samples >= 8, "samples_per_class", "at least 8", samples)
        for name in ("lr", "oneshot_lr", "bias_rate"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, "a finite number above 0", value)
        for name in ("alpha", "beta", "bound", "gate_lr_scale"):
            require(0 <= getattr(self, name) < float("inf"), name, "a finite number of at least 0", getattr(self, name))
        choices = {
            "scope": ("all", "experts", "path"),
            "oneshot_optimizer": ("adam", "sgd"),
            "augment": (None, "none", "shift", "flip"),
            "stem_norm": ("batch", "none"),
            "penalty": (*PENALTIES, *INPLACE),
            "balance": (*BALANCES, *CONTROLLERS),
            "metric": ("euclidean", "sqeuclidean", "cosine", "dot"),
            "prototypes": ("random", "data"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, name, "one of " + ", ".join(filter(None, allowed)), value)
        for router in self.routers:
            require(router in ROUTERS, "routers", "any of " + ", ".join(ROUTERS), router)
        require(len(set(self.routers)) == len(self.routers), "routers", "each named once", " ".join(self.routers))
        if self.penalty == "project":
            require(not isinstance(self.sigma_target, str), "sigma_target", "a number for --penalty project", self.sigma_target)
        if not isinstance(self.temperature, str):
            require(0 < self.temperature < float("inf"), "temperature", 'a finite number above 0, or "auto"', self.temperature)
        self._check_targets()

    def check_image_size(self) -> None:
        side = self.image_size
        require(side is None or side >= 8, "image_size", "at least 8", side)
        require(side is None or side <= LARGEST_IMAGE, "image_size", f"at most {LARGEST_IMAGE}", side)

    def _check_targets(self) -> None:
        sigma_target = 1.0 if isinstance(self.sigma_target, str) else self.sigma_target
        if problem := _problem_of_targets(self.experts, self.dim, sigma_target, self.rank_target, self.relative):
            raise ExperimentError(f"{problem} (--sigma-target, --rank-target, --experts, --dim)")

    def resolved_device(self) -> torch.device:
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            require(device.type in ("cpu", "cuda"), "device", "one that PyTorch can use here: auto, cpu or cuda", self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ExperimentError(f"--device must be one that PyTorch can use here, got {self.device}: {reason}") from None
        return device


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m examples.image_classification",
        "Train mixture-of-experts image classifiers with the routers of SR-MoE (arXiv:2601.03889), run the paper's "
        "one-shot adaptation test, and leave tables, figures and results.json in --out.",
    )
    add_flags(flags, Config)
    add_place(flags, "runs/image_classification")
    flags.add_argument(
        "--preset", choices=PRESETS, help="the paper's set-ups, for --data with enough images: " + str(PRESETS).replace("'", "")
    )
    given = vars(flags.parse_args(arguments))
    preset = given.pop("preset")
    return settle(Config, given, PRESETS[preset] if preset else None)
