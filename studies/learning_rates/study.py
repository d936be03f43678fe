"""All runs: the tuning ones, the choice of strengths, the test ones; what is saved in the repository."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from examples.shared.progress import bars
from examples.shared.runs import versions
from examples.shared.storage import write_json
from examples.transformer_moe import data, model
from examples.transformer_moe.config import Config
from examples.transformer_moe.data import Text
from studies.queue import Record, file_of, finish, records, same

from .protocol import STAGES, Protocol, Run, Strengths, config_of, test, tuning
from .train import train


def study(
    protocol: Protocol, out: Path, stages: tuple[str, ...] = STAGES, models: tuple[str, ...] = (), seeds: int = 0
) -> None:
    """Do what is left of the stages, for some models (none: all) and for the first test seeds (0: all)."""
    same(out / "protocol.json", protocol, "--out must be of one protocol")
    texts = Texts(protocol, out)
    wanted = {**protocol, "models": {name: of for name, of in protocol["models"].items() if not models or name in models}}
    if seeds:
        wanted["seeds"] = {**protocol["seeds"], "test": [protocol["seeds"]["test"][0], seeds]}
    with bars() as progress:
        for stage in stages:
            runs = tuning(wanted) if stage == "tuning" else test(wanted, choose(wanted, records(out)))
            finish(runs, stage, out, progress, lambda run: _do(run, texts, out, progress))


def choose(protocol: Protocol, found: list[Record]) -> Strengths:
    """The strengths of the models whose tuning runs are all there."""
    losses: dict[tuple[str, str, float], list[float]] = {}
    for record in found:
        if record["stage"] == "tuning":
            losses.setdefault((record["model"], record["arm"], record["strength"]), []).append(record["loss"])
    chosen: Strengths = {}
    for name in protocol["models"]:
        wanted = [run for run in tuning(protocol) if run.model == name]
        have = {(r["arm"], r["strength"], r["rate"], r["seed"]) for r in found if r["stage"] == "tuning" and r["model"] == name}
        if all((run.arm, run.strength, run.rate, run.seed) in have for run in wanted):
            chosen[name] = {
                arm: min(settings["strengths"], key=lambda strength: fmean(losses[name, arm, strength]))
                for arm, settings in protocol["arms"].items()
                if "strengths" in settings
            }
    return chosen


class Texts:
    """The text of this process, read once a model, and the same that all other runs in `out` had."""

    def __init__(self, protocol: Protocol, out: Path) -> None:
        self._protocol, self._out = protocol, out
        self._read: dict[str, tuple[Config, Text]] = {}

    def of(self, name: str) -> tuple[Config, Text]:
        if name not in self._read:
            model.quiet()
            config = config_of(self._protocol, name)
            text = data.load(config, model.byte_tokenizer())
            same(self._out / "text.json", {"digest": text.digest, "domains": text.domains}, "--out must be of one text")
            self._read[name] = config, text
        return self._read[name]


def _do(run: Run, texts: Texts, out: Path, progress: Progress) -> None:
    torch.set_num_threads(1)  # processes share the cores
    config, text = texts.of(run.model)
    write_json(file_of(out, run), train(config, run, text))


def gather(protocol: Protocol, out: Path) -> dict[str, Any]:
    """What is saved in the repository."""
    return {"protocol": protocol, "versions": versions("transformers"), "runs": records(out)}
