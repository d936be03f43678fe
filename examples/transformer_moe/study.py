"""All arms and seeds of one experiment: run what is missing, save each step, gather the results."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]
from rich.progress import Progress

from examples.shared.command import Options, telling
from examples.shared.machine import check_memory
from examples.shared.progress import bars, console
from examples.shared.runs import prepare, versions
from examples.shared.storage import read_json, write_json

from . import data, measure, model, summary
from .config import Config, processes
from .data import Text
from .train import Phase, Run, fit

# of no consequence for what is computed
FREE = ("report_to",)


def run(config: Config, options: Options) -> dict[str, Any] | None:
    """Run the experiment, or what is left of it; what is written to results.json, None on the processes that do not write."""
    model.quiet()
    state = PartialState(cpu=config.resolved_device() == "cpu")
    tokenizer = model.tokenizer(config)
    text = data.load(config, tokenizer)
    check(config)
    settings = dataclasses.asdict(config) | {"device": config.resolved_device(), "digest": text.digest}
    earlier: list[dict[str, str]] = []
    if state.is_main_process:
        kept = {name: value for name, value in settings.items() if name not in FREE}
        earlier = prepare(kept, options, "text", "dataset")
    state.wait_for_everyone()
    parts: dict[str, list[dict[str, Any]]] = {arm: [] for arm in config.arms}
    with bars() as progress:
        total = progress.add_task("runs", total=config.seeds * len(config.arms), note="", visible=state.is_main_process)
        for seed in range(config.seeds):
            for arm in config.arms:
                parts[arm].append(_run_one(config, arm, seed, text, tokenizer, options.out, progress, state))
                progress.advance(total)
    if not state.is_main_process:
        return None
    experts = len(parts[config.arms[0]][0]["train"]["history"][0]["load"][0])
    by_token, at_best = measure.told_by_tokens(text.validation, experts)
    results = {
        **made_by(config, earlier),
        "data": {
            "domains": text.domains,
            "digest": text.digest,
            "train_windows": [len(windows) for windows in text.train],
            "validation_tokens": text.validation.numel(),
            "entropy": dict(zip(text.domains, text.entropy, strict=True)),
            "pooled_entropy": text.pooled_entropy,
            "specialisation_by_token": by_token,
            "specialisation_of_tokens": at_best,
            "copied": dict(zip(text.domains, data.copied(text), strict=True)),
            "copied_length": data.copied_length(text),
        },
        "adapt_domain": adapt_domain(config, text),
        **summary.of(parts, adapt_domain(config, text)),
        "runs": parts,
    }
    write_json(options.out / "results.json", results)
    return results


def check(config: Config) -> None:
    """Whether the new model is one that can be made and trained here."""
    if config.model is None:
        rule = "--architecture, --layers, --dim, --hidden, --experts and --top-k must make a model of transformers"
        with telling(rule), torch.device("meta"):
            largest = model.empty(model.settings(config))
        check_memory(largest, torch.device(config.resolved_device()), "--dim, --hidden, --experts or --layers")


def made_by(config: Config, earlier: list[dict[str, str]]) -> dict[str, Any]:
    """Of the results: with what they were made."""
    return {
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name() if config.resolved_device() == "cuda" else "cpu",
        "processes": processes(),
        "versions": versions("transformers", "accelerate"),
        "earlier_versions": earlier,
        "seeds": list(range(config.seeds)),
    }


def adapt_domain(config: Config, text: Text) -> str | None:
    """None: no adaptation test, which needs a second domain that can lose."""
    return (config.adapt_domain or text.domains[0]) if config.adapt_steps and len(text.domains) > 1 else None


def _run_one(
    config: Config, arm: str, seed: int, text: Text, tokenizer: Any, out: Path, progress: Progress, state: PartialState
) -> dict[str, Any]:
    name = f"{arm}-seed{seed}"
    file = out / "parts" / f"{name}.json"
    part: dict[str, Any] = read_json(file) if file.exists() else {"arm": arm, "seed": seed}
    state.wait_for_everyone()  # all have read it before one writes it
    if part.get("complete"):
        return part
    here = Run(arm, seed, out / "work" / name, out / "models" / name, out / "logs" / name)
    started = time.perf_counter()
    for phase in phases(config, text, seed):
        if phase.name in part:
            continue
        task = progress.add_task(f"{name}: {phase.name}", total=phase.steps, note="", visible=state.is_main_process)
        part[phase.name] = fit(
            config,
            here,
            phase,
            text,
            tokenizer,
            lambda step, task=task: progress.update(task, completed=step),  # type: ignore[misc]
        )
        progress.remove_task(task)
        part = save(file, part, state)
    part = save(file, part | {"complete": True}, state)
    if state.is_main_process:
        shutil.rmtree(here.work, ignore_errors=True)
        last = part["train"]["history"][-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f} nats a byte"
        console.print(
            f"{name:<16} loss {loss}   load CV {max(last['load_cv']):.2f} at worst   "
            f"dead {sum(last['dead'])}   {time.perf_counter() - started:.0f} s"
        )
    return part


def phases(config: Config, text: Text, seed: int) -> list[Phase]:
    found = [
        Phase(
            "train",
            data.draw(text, config, seed, config.steps),
            config.steps,
            config.evaluations,
            config.lr,
            "cosine",
            config.steps // 10,
        )
    ]
    domain = adapt_domain(config, text)
    if domain is not None:
        steps = config.adapt_steps
        windows = data.draw(text, config, seed, steps, text.domains.index(domain))
        # without a warm-up the first steps of a new Adam are of full size in every direction
        schedule = "constant_with_warmup"
        found.append(Phase("adapt", windows, steps, config.adapt_evaluations, config.adapt_lr, schedule, steps // 4))
    return found


def save(file: Path, part: dict[str, Any], state: PartialState) -> dict[str, Any]:
    """What a resumed run reads: None for a number that is not finite."""
    if state.is_main_process:
        write_json(file, part)
    state.wait_for_everyone()
    saved: dict[str, Any] = read_json(file)
    state.wait_for_everyone()  # all have read it before one writes it again
    return saved
