"""A trained model goes on with one domain, under each preset of `wrap_moe`: `python -m examples.transformer_moe.finetune`.

Protocol, fixed before any result. For each seed one model is trained on all domains without a term. From it each arm goes on
with the first domain alone: same weights to begin with, same batches, a new Adam, small constant learning rate after a warm-up,
and a term that sees the trained gates first. The coefficients are the defaults of `wrap_moe`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import Any, ClassVar

import torch
from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]
from rich.progress import Progress

from examples.shared.command import ExperimentError, Options, add_flags, add_place, finish, flag, parser, settle
from examples.shared.progress import bars, console
from examples.shared.runs import prepare, versions
from examples.shared.storage import read_json, write_json

from . import data, finetune_summary, model, study
from .config import FINETUNING, Config, processes
from .train import Run, fit

# the fewest steps that still have every part: to see it work, not to learn from
QUICK = {"seeds": 2, "steps": 20, "evaluations": 1, "adapt_steps": 10, "adapt_evaluations": 2, "domain_bytes": 32768}
QUICK |= {"validation_windows": 4, "layers": 2, "dim": 64, "hidden": 32}
# of no meaning here
UNUSED = ("own_coef", "sigma_target")


@dataclasses.dataclass(frozen=True)
class Finetuning(Config):
    known_arms: ClassVar[tuple[str, ...]] = FINETUNING

    arms: list[str] = flag(FINETUNING, f"any of: {', '.join(FINETUNING)} (default: all)", nargs="+", type=str)
    seeds: int = flag(5, "how many seeds, 0 ... seeds-1; each trains a model of its own, from which all arms go on")
    adapt_steps: int = flag(100, "steps of fine-tuning")
    adapt_evaluations: int = flag(5, "measurements in fine-tuning beside the one before it")

    def validate(self) -> None:
        super().validate()
        if not self.adapt_steps:
            raise ExperimentError("--adapt-steps must be at least 1, got 0; fine-tuning is what this command does")


def parse(arguments: list[str] | None = None) -> tuple[Finetuning, Options]:
    flags = parser(
        "python -m examples.transformer_moe.finetune",
        "Fine-tune trained mixture-of-experts language models on one domain, with and without the presets of wrap_moe; leave a "
        "table and results.json in --out.",
    )
    add_flags(flags, Finetuning, without=UNUSED)
    flags.add_argument("--quick", action="store_true", help="a run of seconds, to see that it works")
    add_place(flags, "runs/transformer_moe_finetune")
    given = vars(flags.parse_args(arguments))
    return settle(Finetuning, given, QUICK if given.pop("quick") else None)


def run(config: Finetuning, options: Options) -> dict[str, Any] | None:
    """Run the study, or what is left of it; what is written to results.json, None on the processes that do not write."""
    model.quiet()
    state = PartialState(cpu=config.resolved_device() == "cpu")
    tokenizer = model.tokenizer(config)
    text = data.load(config, tokenizer)
    domain = study.adapt_domain(config, text)
    if domain is None:
        raise ExperimentError(f"--dataset must hold two domains at least, one to learn and one to forget, got {text.domains}")
    settings = dataclasses.asdict(config) | {"device": config.resolved_device(), "digest": text.digest}
    if state.is_main_process:
        prepare({name: value for name, value in settings.items() if name not in study.FREE}, options, "text", "dataset")
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
        "config": dataclasses.asdict(config),
        "device": torch.cuda.get_device_name() if config.resolved_device() == "cuda" else "cpu",
        "processes": processes(),
        "versions": versions("transformers", "accelerate"),
        "seeds": list(range(config.seeds)),
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
    config: Finetuning,
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


def main(arguments: list[str] | None = None) -> int:
    def work() -> str | None:
        config, options = parse(arguments)
        results = run(config, options)
        if results is None:
            return None
        finetune_summary.write(results, options.out)
        return f"results: {options.out / 'results.json'}, tables.md"

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())
