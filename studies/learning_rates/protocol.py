"""study.toml -> runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from examples.shared.command import ExperimentError
from examples.transformer_moe.config import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROTOCOL = Path(__file__).with_name("study.toml")
UNUSED = {"report_to": ["none"], "evaluations": 1, "adapt_steps": 0}  # there is one measurement, at the end
Protocol = dict[str, Any]
Strengths = dict[str, dict[str, float]]  # model -> arm -> the one that was chosen


class Run(NamedTuple):
    stage: str  # tuning or test
    model: str
    arm: str
    strength: float  # 0 for an arm without one
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}.{self.model}.{self.arm}-{self.strength:g}.rate{self.rate:g}.seed{self.seed}"


def read(path: Path = PROTOCOL) -> Protocol:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"--protocol must be a readable TOML file, got {path}: {error}") from None
    missing = [name for name in ("settings", "models", "rates", "seeds", "arms") if name not in found]
    if missing:
        raise ExperimentError(f"--protocol must have the sections of study.toml, got {path} without {', '.join(missing)}")
    for model in found["models"]:
        config_of(found, model).validate()
    return found


def config_of(protocol: Protocol, model: str) -> Config:
    try:
        return Config(**protocol["settings"] | protocol["models"][model] | UNUSED)
    except TypeError as error:
        raise ExperimentError(f"--protocol may set the flags of examples.transformer_moe only: {error}") from None


def tuning(protocol: Protocol) -> list[Run]:
    """Seed by seed: what is cut short has whole seeds."""
    first, count = protocol["seeds"]["tuning"]
    return [
        Run("tuning", model, arm, strength, rate, seed)
        for model in protocol["models"]
        for seed in range(first, first + count)
        for arm, settings in protocol["arms"].items()
        for strength in settings.get("strengths", [])
        for rate in protocol["rates"]["tuning"]
    ]


def test(protocol: Protocol, chosen: Strengths) -> list[Run]:
    """Of the models whose strengths are known."""
    first, count = protocol["seeds"]["test"]
    return [
        Run("test", model, arm, chosen[model].get(arm, 0.0), rate, seed)
        for seed in range(first, first + count)
        for model in protocol["models"]
        if model in chosen
        for rate in protocol["rates"]["all"]
        for arm in protocol["arms"]
    ]
