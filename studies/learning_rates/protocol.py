"""study.toml -> runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from examples.shared.command import ExperimentError, check_kinds, telling
from examples.transformer_moe.config import Config

STAGES = ("tuning", "test")
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
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"--protocol must be a readable TOML file, got {path}: {error}") from None
    missing = [name for name in ("settings", "models", "rates", "seeds", "arms") if name not in found]
    if missing:
        raise ExperimentError(f"--protocol must have the sections of study.toml, got {path} without {', '.join(missing)}")
    try:
        with telling(f"it must be of the form of {PROTOCOL.name}"):
            for model in found["models"]:
                config_of(found, model).validate()
            tuning(found)
            test(found, {model: {} for model in found["models"]})
    except ExperimentError as error:
        raise ExperimentError(f"--protocol {path}: {error}") from error
    return found


def config_of(protocol: Protocol, model: str) -> Config:
    settings = protocol["settings"] | protocol["models"][model] | UNUSED
    check_kinds(Config, settings)
    return Config(**settings)


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
