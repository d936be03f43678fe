"""The speed that the project set itself, against what several runs measured.

    for run in 1 2 3; do python -m benchmarks --json figures_$run.json; done
    python -m benchmarks.targets figures_*.json

Of each target the table shows the median over the runs, where each run is the median over its rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._harness import ratio


@dataclass(frozen=True)
class Target:
    """A ratio of two contenders in every matching row of a report, and its bound."""

    report: str  # how its title begins
    row: str  # how the row's name begins
    above: str
    below: str
    bound: float
    at_least: bool = False

    @property
    def ratio(self) -> str:
        return " / ".join(CALLED.get(name, name) for name in (self.above, self.below))

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


# contenders whose names in the measurements say too little
CALLED = {"exact": "exact, in the loss", "power": "power, in the loss", "step": "at the step"}
LITERAL, LIMIT = "Penalty over all gates", "Penalty against the memory limit"
ROUTER, EXPERTS, STEP, WRAP = "PrototypeRouter", "Experts", "Training step", "wrap_moe"
TARGETS = [
    Target(LITERAL, "Mixtral", "literal", "exact", 12, at_least=True),
    Target(LITERAL, "OLMoE", "literal", "exact", 6, at_least=True),
    *(Target(LITERAL, name, "literal", "exact", 7, at_least=True) for name in ("Qwen3", "DeepSeek", "Kimi")),
    *(
        Target(LITERAL, name, "literal", "step", bound, at_least=True)
        for name, bound in (("Mixtral", 25), ("OLMoE", 12), ("Qwen3", 12))
    ),
    *(Target(LIMIT, name, "power", "limit", 4) for name in ("OLMoE", "Qwen3", "DeepSeek", "Kimi")),
    *(Target(LIMIT, name, "step", "limit", 4) for name in ("Mixtral", "OLMoE")),
    Target(ROUTER, "", "sqeuclidean", "linear", 1.3),
    Target(ROUTER, "", "euclidean", "linear", 1.5),
    Target(ROUTER, "", "cdist", "euclidean", 1, at_least=True),
    Target(EXPERTS, "", "loop", "batched", 1, at_least=True),
    Target(STEP, "", "whole", "dense", 1.3),
    Target(WRAP, "step", "wrapped", "unwrapped", 1.03),
    Target(WRAP, "peak", "wrapped", "unwrapped", 1.03),
]


def rows(target: Target, run: dict[str, Any]) -> dict[str, float]:
    """Median ratio of each row that the target is about."""
    return {
        name: ratio(seconds, target.above, target.below)[0]
        for report in run["reports"]
        if report["title"].startswith(target.report)
        for name, seconds in report["raw"].items()
        if name.startswith(target.row) and target.above in seconds and target.below in seconds
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["| measured | ratio | target | median of the runs | holds |", "|---|---|---|---|---|"]
    for target in TARGETS:
        found = [rows(target, run) for run in runs]
        values = {name: [one[name] for one in found] for name in found[0]}
        middle = {name: statistics.median(of_runs) for name, of_runs in values.items()}
        missed = [name for name, value in middle.items() if not target.holds(value)]
        low, high = min(middle.values()), max(middle.values())
        name = f"{target.report}: {next(iter(middle))}" if len(middle) == 1 else f"{target.report}, {len(middle)} sizes"
        holds = "yes" if not missed else "**no**" if len(middle) == 1 else f"**not** {'; '.join(missed)}"
        details = "; ".join(", ".join(f"{value:.3g}" for value in values[name]) for name in missed)
        lines.append(
            f"| {name} | {target.ratio} | {'at least' if target.at_least else 'at most'} {target.bound:g} "
            f"| {f'{low:.3g}' if len(middle) == 1 else f'{low:.3g} to {high:.3g}'} "
            f"| {holds}{f' (runs: {details})' if details else ''} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=(__doc__ or "").splitlines()[0])
    flags.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by python -m benchmarks --json")
    flags.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = flags.parse_args(argv)
    runs = []
    for file in arguments.files:
        try:
            runs.append(json.loads(file.read_text(encoding="utf-8")))
            table(runs[-1:])
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            flags.error(f"files must be what `python -m benchmarks --json` wrote of all benchmarks, got {file} ({reason})")
    found = table(runs)
    print(found)
    if arguments.markdown:
        arguments.markdown.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
