"""What comes before the first step: `import spectral_router` on top of `import torch`, and a handle on a model of 100 layers.

    python -m benchmarks.startup

Every import is timed in a process of its own, after torch is loaded and with bytecode cached, as in an installed package.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from spectral_router import find_gates, wrap_moe

from ._harness import Report, parser, progress, publish, quartiles

# torch takes its bytecode from where it lies; ours goes to a folder of this run, for callers whose settings forbid writing it
CHILD = """
import sys, time
marks = [time.perf_counter()]
import torch
marks.append(time.perf_counter())
{before}
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
marks.append(time.perf_counter())
{timed}
marks.append(time.perf_counter())
print(marks[1] - marks[0], marks[3] - marks[2])
"""
IMPORTS = {
    "spectral_router": ("", "import spectral_router"),
    "einops alone": ("", "import einops"),
    "spectral_router, einops imported before": ("import einops", "import spectral_router"),
}


def import_seconds(before: str, timed: str, cache: str) -> tuple[float, float]:
    """Of torch and of what is timed, one after the other in one process."""
    command = [sys.executable, "-c", CHILD.format(before=before, timed=timed), cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    base, own = map(float, done.stdout.split())
    return base, own


def imports(repeats: int, quick: bool) -> Report:
    report = Report("Import, after torch", ["import", "ms", "quartiles", "share of the import of torch before it, %"])
    wanted = dict(list(IMPORTS.items())[:1]) if quick else IMPORTS
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    with tempfile.TemporaryDirectory() as cache:
        for repeat in range(0 if quick else -1, repeats):  # the first round writes the bytecode
            progress(f"imports, round {repeat + 1} of {repeats}")
            for name, parts in wanted.items():
                taken = import_seconds(*parts, cache)
                if repeat >= 0:
                    seconds[name].append(taken)
    for name, pairs in seconds.items():
        torches, own = map(list, zip(*pairs, strict=True))
        report.raw[name] = {"torch": torches, "own": own}
        share = statistics.median(100 * part / base for base, part in pairs)
        report.rows.append([*row(name, own), f"{share:.2f}"])
    report.notes = [f"Medians of {repeats} processes each, in turns."]
    return report


def mixtral(layers: int) -> nn.Module:
    """Many layers, hardly any width: what is timed looks at modules, not at numbers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model: nn.Module = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    )
    return model.train()


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def handles(repeats: int, layers: int) -> Report:
    progress(f"a model of {layers} layers")
    report = Report(f"Handle, Mixtral of {layers} layers", ["call", "ms", "quartiles"])
    model = mixtral(layers)
    assert len(find_gates(model)) == layers
    names = ("find_gates(model)", "wrap_moe(model)", "handle.remove()")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        round_of = dict.fromkeys(names, 0.0)
        round_of["find_gates(model)"] = timed(lambda: find_gates(model))
        start = time.perf_counter()
        handle = wrap_moe(model)
        round_of["wrap_moe(model)"] = time.perf_counter() - start
        round_of["handle.remove()"] = timed(handle.remove)
        if repeat >= 0:
            for name, taken in round_of.items():
                seconds[name].append(taken)
    report.raw[f"{layers} layers"] = seconds
    report.rows = [row(name, times) for name, times in seconds.items()]
    report.notes = [f"{sum(1 for _ in model.modules())} modules. Once a run, before training."]
    return report


def row(name: str, seconds: Sequence[float]) -> list[str]:
    middle, low, high = (1e3 * value for value in quartiles(seconds))
    return [name, f"{middle:.3g}", f"{low:.3g} - {high:.3g}"]


def measure(repeats: int, quick: bool) -> list[Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model's own balance loss is on is not the question here
        return [imports(1 if quick else repeats, quick), handles(repeats, 4 if quick else 100)]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("startup", __doc__, repeats=11).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
