"""All runs of the study: what is missing is run, and what is there is gathered."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]

from examples.shared.command import ExperimentError, Options
from examples.shared.progress import console
from examples.shared.runs import prepare, versions
from examples.shared.storage import read_json, write_json
from examples.transformer_moe import data, model
from examples.transformer_moe.config import SCOPES, Config, processes
from examples.transformer_moe.data import Text
from examples.transformer_moe.study import FREE, check, phases
from examples.transformer_moe.train import Run, fit

from . import report
from .config import SET_HERE


def run(config: Config, options: Options) -> dict[str, Any]:
    """Run what is missing, domains outermost, so that a run that is cut short has all seeds of some; gather what is there."""
    if processes() > 1:
        raise ExperimentError("the study runs in one process; start it without torchrun")
    model.quiet()
    PartialState(cpu=config.resolved_device() == "cpu")
    tokenizer = model.tokenizer(config)
    text = data.load(config, tokenizer)
    check(config)
    settings = dataclasses.asdict(config) | {"device": config.resolved_device(), "digest": text.digest}
    kept = {name: value for name, value in settings.items() if name not in (*FREE, *SET_HERE)}
    earlier = prepare(kept, options, "text", "dataset")
    parts: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for domain in text.domains:
        for arm in config.arms:
            for seed in range(config.seeds):
                parts += _adapt(config, arm, seed, domain, text, tokenizer, options)
                results = {
                    "config": dataclasses.asdict(config),
                    "versions": versions("transformers", "accelerate"),
                    "earlier_versions": earlier,
                    "domains": text.domains,
                    **report.of(parts),
                    "runs": parts,
                }
                write_json(options.out / "results.json", results)
                report.write(results, options.out)
    return results


def _adapt(
    config: Config, arm: str, seed: int, domain: str, text: Text, tokenizer: Any, options: Options
) -> list[dict[str, Any]]:
    """All scopes of one trained model, which is trained first if it is not there."""
    final = options.out / "models" / f"{arm}-seed{seed}"
    found = []
    for scope in ("train", *SCOPES):
        train, name = scope == "train", f"{arm}-seed{seed}" + ("" if scope == "train" else f"-{domain}-{scope}")
        file = options.out / "parts" / f"{name}.json"
        if not file.exists():
            here = dataclasses.replace(config, adapt_domain=domain, adapt_scope="all" if train else scope)
            place = Run(arm, seed, options.out / "work" / name, final, options.out / "logs" / name)
            phase = fit(here, place, phases(here, text, seed)[not train], text, tokenizer, lambda step: None)
            write_json(file, {"arm": arm, "seed": seed, "domain": domain, "scope": scope, **phase})
            shutil.rmtree(place.work, ignore_errors=True)
            console.print(f"{name:<32} {phase['history'][-1]['loss']:.4f} nats a byte")
        if not train:
            found.append(read_json(file))
    return found
