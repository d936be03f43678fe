"""The arms of the comparison, and the grid that the strength of each is chosen from. Fixed before any result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from examples.image_classification.config import Config

COEFFICIENTS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Arm:
    """One way to train: a router of the experiment, its settings, and the field of Config that says how strongly."""

    router: str
    settings: dict[str, Any] = field(default_factory=dict)
    strength: str | None = None
    grid: tuple[float, ...] = COEFFICIENTS  # the weakest first

    def config(self, base: Config, strength: float | None) -> Config:
        chosen: dict[str, Any] = {} if self.strength is None else {self.strength: strength}
        return replace(base, routers=[self.router], **self.settings, **chosen)

    def candidates(self) -> list[float]:
        return [] if self.strength is None else list(self.grid)


def _balance(name: str, strength: str = "beta", grid: tuple[float, ...] = COEFFICIENTS) -> Arm:
    return Arm("clustering", {"balance": name}, strength, grid)


def _penalty(name: str, **settings: Any) -> Arm:
    """On top of the experiment's balance loss, CV² with coefficient 0.1."""
    return Arm("spectral", {"penalty": name, **settings}, "alpha")


ARMS = {
    "linear gate": Arm("baseline"),
    "prototypes": Arm("clustering-balance"),
    # balance, without a penalty
    "CV² (eq. 6)": _balance("cv2"),
    "KL": _balance("kl"),
    "mutual information": _balance("mi"),
    "Switch": _balance("switch"),
    "z-loss": _balance("z"),
    # the logits of prototypes are distances, which this loss wants to be zero
    "z-loss, linear gate": Arm("baseline+balance", {"balance": "z"}, "beta"),
    "relative constraint": _balance("relative", "bound", (1.0, 0.5, 0.3, 0.1)),
    "mean constraint": _balance("mean", "bound", (0.5, 0.3, 0.1, 0.03)),
    "loss-free bias": _balance("bias", "bias_rate", (1e-4, 1e-3, 1e-2, 1e-1)),
    # penalties, all beside CV² at 0.1
    "no penalty": Arm("clustering"),
    "SpectralRankPenalty": _penalty("rank"),
    "the same, relative": _penalty("rank", relative=True),
    "spectral norm": _penalty("norm"),
    "(σ² − 1)²": _penalty("lewandowski"),
    "MHE": _penalty("mhe"),
    "MHE, half-space": _penalty("mhe-half"),
    "CoMHE, random": _penalty("comhe"),
    "orthogonality, SO": _penalty("so"),
    "orthogonality, SimBal": _penalty("simbal"),
    "orthogonality, ERNIE": _penalty("ernie"),
    "projection": Arm("spectral", {"penalty": "project"}),
    "rescue": Arm("spectral", {"penalty": "rescue"}),
}
REFERENCE = "SpectralRankPenalty"
