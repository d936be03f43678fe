"""Processes that run a list of checks one after the other, and what each check gave."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# of one collective, and of all checks together: where a rank waits for nothing, the tests fail instead of hanging
PATIENCE = timedelta(seconds=240)
LIMIT = 600


def run(modules: list[str], folder: Path, ranks: int = 2) -> dict[str, float | str]:
    """For each check in the modules' CHECKS: its error on the worst rank, or what it raised."""
    context = mp.start_processes(work, (modules, str(folder), ranks), nprocs=ranks, join=False, start_method="spawn")
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the checks of {', '.join(modules)} did not end in {LIMIT} s")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return {name: max((result[name] for result in results), key=_badness) for name in results[0]}


def names(module: str) -> list[str]:
    return [f"{module}: {name}" for name in importlib.import_module(module).CHECKS]


def _badness(result: float | str) -> float:
    return float("inf") if isinstance(result, str) or result != result else result


def work(rank: int, modules: list[str], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, os.path.dirname(__file__))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=PATIENCE)
    results: dict[str, float | str] = {}
    for module in modules:
        for name, check in importlib.import_module(module).CHECKS.items():
            title = f"{module}: {name}"
            faulthandler.dump_traceback_later(0.9 * PATIENCE.total_seconds())  # where a rank is that the others wait for
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    results[title] = check(rank)
            except Exception:
                results[title] = traceback.format_exc()
            try:
                dist.barrier()
            except RuntimeError as error:  # what this rank raised may be why the others still wait in the check
                raise RuntimeError(f"{title}: alone at its end; it gave {results[title]}") from error
    faulthandler.cancel_dump_traceback_later()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # the results of all are there
    # without the interpreter's own end: in it a thread of torch or gloo now and then aborts a process that is done
    os._exit(0)
