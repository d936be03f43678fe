"""What every benchmark does alike: time contenders in turns, take ratios, note the machine, print a table, write JSON."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2
PATIENCE = 5.0  # seconds after which one comparison ends, once it has had FEWEST rounds
FEWEST = 3


@dataclass
class Report:
    """One table of measurements: the same cells are printed and written as JSON."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # every single measurement behind the table, seconds or bytes, by row and contender
    raw: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note)), ""])


chosen: str | None = None  # by --device


def device() -> torch.device:
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine() -> dict[str, str]:
    """Where the figures come from: names and versions."""
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    cuda = {"cuda": str(torch.version.cuda)} if device().type == "cuda" else {}
    python = {"python": platform.python_version(), "system": platform.system()}
    return {"device": name, "torch": torch.__version__, **cuda, **python}


def interleave(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call. The contenders take turns, each round in another order: drift of the machine hits all alike.

    Slow ones have fewer rounds than were asked for; their spread is small, too.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    began = time.perf_counter()
    for repeat in range(-WARM_UP, repeats):
        if time.perf_counter() - began > PATIENCE:
            if repeat >= FEWEST:
                break
            if -WARM_UP < repeat < 0:
                continue
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _timed(contenders[name])
            if repeat >= 0:
                seconds[name].append(elapsed)
    return seconds


class Clock:
    """Marks between the parts of a call: wall time on a CPU, events on the stream of a GPU."""

    def __init__(self) -> None:
        self.cuda = device().type == "cuda"
        self.marks: list[Any] = []
        if self.cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each part, from one mark to the next."""
        pairs = itertools.pairwise(self.marks)
        if self.cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def _timed(call: Callable[[], object]) -> float:
    clock = Clock()
    call()
    clock.mark()
    return clock.seconds()[0]


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles of name / base over the rounds: neighbours in time, so that slow phases of the machine cancel."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


def show_ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str, digits: int = 2) -> str:
    middle, low, high = ratio(seconds, name, base)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def show_ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g}"


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once during the call, over those alive before it."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's own lines (starts, stops, no GPU found) come from C++ and heed no setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def progress(text: str) -> None:
    """What runs now, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parser(module: str, description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=(description or "").splitlines()[0])
    found.add_argument("--repeats", type=int, default=repeats, help=f"rounds of measurement (default {repeats})")
    found.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run, not how fast")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    return found


def header() -> str:
    return " · ".join(f"{key} {value}" for key, value in machine().items()) + "\n"


def show(reports: Sequence[Report]) -> None:
    progress("")
    for report in reports:
        print(report.markdown(), flush=True)


def save(
    reports: Sequence[Report],
    json_file: Path | None = None,
    markdown_file: Path | None = None,
    seconds: Mapping[str, float] | None = None,
) -> None:
    """Each file as a whole or not at all. `seconds`: what each part of the run took."""
    record = {"machine": machine(), "seconds": seconds or {}, "reports": [asdict(report) for report in reports]}
    tables = "\n".join([header(), *(report.markdown() for report in reports)])
    for file, text in ((json_file, json.dumps(record, indent=1, ensure_ascii=False)), (markdown_file, tables)):
        if file is not None:
            partial = file.with_name(file.name + ".part")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)


def publish(reports: Sequence[Report], json_file: Path | None = None) -> None:
    """What one benchmark run by itself ends with."""
    print(header())
    show(reports)
    save(reports, json_file)
