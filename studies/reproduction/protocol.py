"""study.toml -> the runs of each stage."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.image_classification.config import Config
from examples.shared.command import ExperimentError, check_kinds, require, telling
from studies.oneshot.rule import Rule

PROTOCOL = Path(__file__).with_name("study.toml")
RESULTS = Path(__file__).with_name("results.json")
STAGE_OF_CONDITIONS = "failure"
STAGES = ("sweep", "main", "second", "confirm", STAGE_OF_CONDITIONS)  # in the order in which they run
Protocol = dict[str, Any]
Settings = dict[str, Any]  # fields of Config


class Run(NamedTuple):
    """One network: what it is part of, how it is trained, what it is then asked."""

    stage: str
    phase: str
    arm: str
    seed: int
    config: Config  # of one router
    rules: list[Rule]
    within: str  # the images that accuracy and delta are of, test or val

    @property
    def name(self) -> str:
        """What its files are called; unique."""
        parts = (self.stage, self.phase, self.arm.replace("+", "-and-"), f"seed{self.seed}")
        return ".".join(re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)


class Condition(NamedTuple):
    """Under which arms are compared; it may be of a phase of its own, and of more or fewer seeds than the others."""

    name: str
    phase: str
    seeds: int
    changes: Settings


def read(path: Path = PROTOCOL, stages: tuple[str, ...] = STAGES) -> Protocol:
    """The protocol, of which all runs can be made: what is wrong with it is said before any of them."""
    try:
        protocol = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"--protocol must be a readable TOML file, got {path}: {error}") from None
    try:
        with telling(f"it must be of the form of {PROTOCOL.name}"):
            _check(protocol, stages)
    except ExperimentError as error:
        raise ExperimentError(f"--protocol {path}: {error}") from error
    return protocol


def _check(protocol: Protocol, stages: tuple[str, ...]) -> None:
    """Make every run that needs no other one's results, and read what the later stages need."""
    places = dict.fromkeys(protocol["data"], "there")
    later: dict[str, dict[str, Settings]] = {}
    if "sweep" in stages:
        arms = sweep_arms(protocol)
        later = {"second": arms, "confirm": {router: {"routers": [router]} for router in protocol["confirm"]["routers"]}}
        require(protocol["sweep"]["center"] in arms, "center", "one of the sweep's arms", protocol["sweep"]["center"])
        for name in protocol["sweep"]["rules"]:
            plasticity = rule_of(protocol, name)["plasticity"]
            require(isinstance(plasticity, int | float), "plasticity", "a number", plasticity)
    for name in ("accuracy_below", "one_path"):
        require(isinstance(protocol["failed"][name], int | float), name, "a number", protocol["failed"][name])
    for stage in stages:
        for one in runs(protocol, stage, places, later.get(stage)):
            require(one.within in ("test", "val"), "within", "test or val", one.within)
            require(one.config.oneshot_steps == 1, "oneshot_steps", "1", one.config.oneshot_steps)
    for rule in protocol.get("oneshot", {}).get("rules", ()):
        for rate in rule["rates"]:
            asked = {"scope": rule["scope"], "oneshot_optimizer": rule["optimizer"], "oneshot_lr": rate}
            check_kinds(Config, asked)
            Config(**asked).validate()


def runs(protocol: Protocol, stage: str, places: dict[str, str], arms: dict[str, Settings] | None = None) -> list[Run]:
    """The runs of a stage, seed by seed, so that a stage that is cut short has whole seeds.

    `places` says where the data are that the protocol only names, {"photos": folder}; phases on other unnamed data are left
    out. `arms` are the arms of the stages that depend on earlier ones, second and confirm.
    """
    made = [
        _run(protocol, stage, phase, name, seed, settings, places)
        for phase, seed, name, settings in _cells(protocol, stage, arms)
        if _place(protocol, phase, places) is not None
    ]
    for one in made:
        one.config.validate()
    return made


def rule_of(protocol: Protocol, name: str) -> dict[str, Any]:
    """The update rule of that name."""
    return next(dict(rule) for rule in protocol["oneshot"]["rules"] if rule["name"] == name)


def phases(protocol: Protocol) -> dict[str, Settings]:
    return dict(protocol["main"]["phases"])


def _cells(protocol: Protocol, stage: str, arms: dict[str, Settings] | None) -> Iterator[tuple[str, int, str, Settings]]:
    """(phase, seed, arm, its settings) of each run."""
    of_stage = protocol[stage]
    first, count = of_stage["seeds"]
    if stage == "main":
        for phase, settings in phases(protocol).items():
            for seed in range(first, first + count):
                for router in settings["routers"]:
                    yield phase, seed, router, {"routers": [router]}
        return
    if stage == STAGE_OF_CONDITIONS:
        every = conditions(protocol)
        for seed in range(first, first + max(one.seeds for one in every)):
            for one in every:
                for arm, settings in of_stage["arms"].items() if seed < first + one.seeds else ():
                    yield one.phase, seed, f"{arm}, {one.name}", {**settings, **one.changes}
        return
    if stage == "sweep":
        arms = sweep_arms(protocol)
    assert arms is not None
    phase = of_stage.get("phase") or protocol["sweep"]["phase"]
    for seed in range(first, first + count):
        for name, settings in arms.items():
            yield phase, seed, name, settings


def conditions(protocol: Protocol) -> list[Condition]:
    of_stage = protocol[STAGE_OF_CONDITIONS]
    common = {"phase": of_stage.get("phase"), "seeds": of_stage["seeds"][1]}
    made = []
    for name, changes in of_stage["conditions"].items():
        rest = {key: value for key, value in changes.items() if key not in common}
        made.append(Condition(name, changes.get("phase", common["phase"]), changes.get("seeds", common["seeds"]), rest))
    return made


def sweep_arms(protocol: Protocol) -> dict[str, Settings]:
    """The routers as they are, then the center with one change at a time."""
    sweep = protocol["sweep"]
    arms: dict[str, Settings] = {router: {"routers": [router]} for router in sweep["routers"]}
    for factor, levels in sweep["factors"].items():
        for level in levels:
            changes = level if isinstance(level, dict) else {factor: level}
            arms[label(changes)] = {"routers": [sweep["center"]], **changes}
    return arms


def label(changes: Settings) -> str:
    """{"alpha": 0.1} -> "alpha 0.1"."""
    return ", ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items())


def _run(protocol: Protocol, stage: str, phase: str, arm: str, seed: int, changes: Settings, places: dict[str, str]) -> Run:
    of_stage = protocol["sweep"] if stage == "second" else protocol[stage]
    of_phase = dict(phases(protocol)[phase])
    data = protocol["data"][of_phase["data"]] | {"data": _place(protocol, phase, places)}
    every = [rule["name"] for rule in protocol["oneshot"]["rules"]]
    names = [] if stage == STAGE_OF_CONDITIONS else of_stage.get("rules", of_phase.get("rules", every))
    of_phase = {key: value for key, value in of_phase.items() if key not in ("routers", "rules")}
    settings = protocol["settings"] | of_phase | data | changes
    if "novel" in of_stage:
        settings["novel"] = of_stage["novel"]
    check_kinds(Config, settings)
    rules = [
        Rule(rule["scope"], rule["optimizer"], rate)
        for rule in protocol["oneshot"]["rules"]
        if rule["name"] in names
        for rate in rule["rates"]
    ]
    return Run(stage, phase, arm, seed, Config(**settings), rules, of_stage["within"])


def _place(protocol: Protocol, phase: str, places: dict[str, str]) -> str | None:
    """What --data would be, None if it is not known where they are."""
    name = phases(protocol)[phase]["data"]
    place: str | None = protocol["data"][name].get("data") or places.get(name)
    return place
