"""All seeds and arms of fine-tuning: run what is missing, save each, gather the results."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]
from rich.progress import Progress

from examples.shared.command import ExperimentError, Options
from examples.shared.progress import bars, console
from examples.shared.runs import prepare
from examples.shared.storage import read_json, write_json

from . import data, finetune_summary, model, study
from .config import Config
from .train import Run, fit


def run(config: Config, options: Options) -> dict[str, Any] | None:
    """Run the study, or what is left of it; what is written to results.json, None on the processes that do not write."""
    model.quiet()
    state = PartialState(cpu=config.resolved_device() == "cpu")
    tokenizer = model.tokenizer(config)
    text = data.load(config, tokenizer)
    study.check(config)
    domain = study.adapt_domain(config, text)
    if domain is None:
        raise ExperimentError(f"--dataset must hold two domains at least, one to learn and one to forget, got {text.domains}")
    settings = dataclasses.asdict(config) | {"device": config.resolved_device(), "digest": text.digest}
    earlier: list[dict[str, str]] = []
    if state.is_main_process:
        kept = {name: value for name, value in settings.items() if name not in study.FREE}
        earlier = prepare(kept, options, "text", "dataset")
    state.wait_for_everyone()
    bases: list[dict[str, Any]] = []
    parts: dict[str, list[dict[str, Any]]] = {arm: [] for arm in config.arms}
    with bars() as progress:
        runs = progress.add_task("runs", total=config.seeds * (1 + len(config.arms)), note="", visible=state.is_main_process)
        for seed in range(config.seeds):
            bases.append(_phase(config, None, seed, text, tokenizer, options, progress, state))
            progress.advance(runs)
            for arm in config.arms:
                parts[arm].append(_phase(config, arm, seed, text, tokenizer, options, progress, state))
                progress.advance(runs)
    if not state.is_main_process:
        return None
    results = {
        **study.made_by(config, earlier),
        "domains": text.domains,
        "domain": domain,
        "parameters": bases[0]["train"]["parameters"],
        "gates": bases[0]["train"]["gates"],
        **finetune_summary.of(parts, domain),
        "trained": bases,
        "runs": parts,
    }
    write_json(options.out / "results.json", results)
    return results


def _phase(
    config: Config,
    arm: str | None,
    seed: int,
    text: data.Text,
    tokenizer: Any,
    options: Options,
    progress: Progress,
    state: PartialState,
) -> dict[str, Any]:
    """Fine-tuning under `arm`; None: the training before it."""
    base = f"trained-seed{seed}"
    name = base if arm is None else f"{arm}-seed{seed}"
    file = options.out / "parts" / f"{name}.json"
    part: dict[str, Any] = read_json(file) if file.exists() else {"arm": arm, "seed": seed}
    state.wait_for_everyone()  # all have read it before one writes it
    if len(part) > 2:
        return part
    train, adapt = study.phases(config, text, seed)
    phase = train if arm is None else adapt._replace(name="finetune")
    here = Run(arm or "none", seed, options.out / "work" / name, options.out / "models" / base, options.out / "logs" / name)
    task = progress.add_task(f"{name}: {phase.name}", total=phase.steps, note="", visible=state.is_main_process)
    part[phase.name] = fit(config, here, phase, text, tokenizer, lambda step: progress.update(task, completed=step))
    progress.remove_task(task)
    part = study.save(file, part, state)
    if state.is_main_process:
        shutil.rmtree(here.work, ignore_errors=True)
        last = part[phase.name]["history"][-1]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f} nats a byte"
        console.print(f"{name:<20} loss {loss}   stable rank {min(last['stable_rank']):.2f} at least")
    return part
