"""`python -m studies.surgery`"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]

from examples.shared.command import ExperimentError, Options, add_flags, add_place, finish, parser, settle
from examples.shared.progress import console
from examples.shared.runs import prepare, versions
from examples.shared.storage import read_json, write_json
from examples.transformer_moe import data, model
from examples.transformer_moe.config import ARMS, SCOPES, Config, processes
from examples.transformer_moe.data import Text
from examples.transformer_moe.study import FREE, phases
from examples.transformer_moe.train import Run, fit

from . import report

SET_HERE = ("adapt_domain", "adapt_scope", "model")
DEFAULTS = {
    "seeds": 5,
    "arms": list(ARMS),
    "sequence": 64,
    "dim": 64,
    "hidden": 64,
    "steps": 300,
    "adapt_evaluations": 12,
    "evaluations": 1,
    "validation_windows": 16,
    "report_to": ["none"],
}


def parse(arguments: list[str] | None = None) -> tuple[Config, Options]:
    flags = parser(
        "python -m studies.surgery",
        "Train small mixture-of-experts language models and adapt each to each domain with everything, all experts or one path "
        "of experts free; leave a table of gain and forgetting in --out.",
    )
    add_flags(flags, Config, SET_HERE, DEFAULTS)
    add_place(flags, "runs/surgery")
    return settle(Config, vars(flags.parse_args(arguments)), DEFAULTS)


def run(config: Config, options: Options) -> dict[str, Any]:
    """Run what is missing, domains outermost, so that a run that is cut short has all seeds of some; gather what is there."""
    if processes() > 1:
        raise ExperimentError("the study runs in one process; start it without torchrun")
    model.quiet()
    PartialState(cpu=config.resolved_device() == "cpu")
    tokenizer = model.tokenizer(config)
    text = data.load(config, tokenizer)
    settings = dataclasses.asdict(config) | {"device": config.resolved_device(), "digest": text.digest}
    prepare({name: value for name, value in settings.items() if name not in (*FREE, *SET_HERE)}, options, "text", "dataset")
    parts: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for domain in text.domains:
        for arm in config.arms:
            for seed in range(config.seeds):
                parts += _adapt(config, arm, seed, domain, text, tokenizer, options)
                results = {
                    "config": dataclasses.asdict(config),
                    "versions": versions("transformers", "accelerate"),
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


def main(arguments: list[str] | None = None) -> int:
    def work() -> str:
        config, options = parse(arguments)
        run(config, options)
        return f"results: {options.out / 'results.json'}, tables.md"

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())
