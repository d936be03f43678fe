"""A trained model goes on with one domain, under each preset of `wrap_moe`: `python -m examples.transformer_moe.finetune`.

Protocol, fixed before any result. For each seed one model is trained on all domains without a term. From it each arm goes on
with the first domain alone: same weights to begin with, same batches, a new Adam, small constant learning rate after a warm-up,
and a term that sees the trained gates first. The coefficients are the defaults of `wrap_moe`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import ClassVar

from examples.shared.command import ExperimentError, Options, add_flags, add_place, finish, flag, importing, parser, settle

from .config import FINETUNING, Config

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


def main(arguments: list[str] | None = None) -> int:
    def work() -> str | None:
        with importing():
            config, options = parse(arguments)
            from . import finetune_study, finetune_summary  # only now: flags and their help need no torch

        with options.held:
            results = finetune_study.run(config, options)
            if results is None:
                return None
            finetune_summary.write(results, options.out)
        return f"results: {options.out / 'results.json'}, tables.md"

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())
