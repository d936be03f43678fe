"""The flags: those of the language models, but for what the study sets itself."""

from __future__ import annotations

from examples.shared.command import Options, add_flags, add_place, parser, settle
from examples.transformer_moe.config import ARMS, Config

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
