"""The runs, each saved when it is done, and their table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.delivery import batches
from benchmarks.wrap import build
from examples.shared.command import ExperimentError
from examples.shared.progress import track
from examples.shared.runs import interval, others, versions
from examples.shared.storage import alone, read_json, write_json, write_text
from spectral_router import wrap_moe

COEFFICIENTS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
WAYS = ("in the gradient", "decoupled")
SLACK = 0.01  # of the task loss, nats
SIZES = {"layers": 4, "dim": 64, "hidden": 64, "experts": 8}


@dataclass(frozen=True)
class Cell:
    seed: int
    way: str  # "none" or one of WAYS
    coefficient: float

    @property
    def name(self) -> str:
        return f"{self.seed} {self.way} {self.coefficient:g}".replace(" ", "_")


def cells(seeds: int) -> list[Cell]:
    return [
        cell
        for seed in range(seeds)
        for cell in (Cell(seed, "none", 0.0), *(Cell(seed, way, c) for way in WAYS for c in COEFFICIENTS))
    ]


def train(cell: Cell, steps: int) -> dict[str, float]:
    """Task loss on held-out batches, and what the gates have become."""
    torch.manual_seed(cell.seed)
    model = build(**SIZES)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle = wrap_moe(model, penalty="spread", penalty_coef=cell.coefficient, balance=None)
    before = handle.metrics()
    handle.attach(optimizer, decoupled=cell.way == "decoupled")
    # one language a seed; its last batches are not trained on
    made = batches(cell.seed, steps + 8, (8, 32))
    for ids in made[:steps]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = handle.metrics()
    with torch.no_grad():
        task = fmean(model.eval()(input_ids=ids, labels=ids).loss.item() for ids in made[steps:])
    drift = [abs(after[name]["sigma_max"] / before[name]["sigma_max"] - 1) for name in after]
    ranks = [row["stable_rank"] for row in after.values()]
    return {"task": task, "stable_rank": fmean(ranks), "lowest_rank": min(ranks), "sigma_drift": fmean(drift)}


def study(out: Path, seeds: int, steps: int, resume: bool) -> str:
    """Do what is left of the runs; their table, which is also written."""
    with alone(out):
        text = table(run(out, seeds, steps, resume), seeds)
        write_text(out / "tables.md", text)
    return text


def run(out: Path, seeds: int, steps: int, resume: bool) -> dict[str, Any]:
    file = out / "results.json"
    settings = {"seeds": seeds, "steps": steps}
    made_with = {"versions": versions("transformers")}
    results: dict[str, Any] = {"settings": settings, "cells": {}, **made_with}
    if file.exists():
        if not resume:
            raise ExperimentError(f"{out} already holds a run; pass --resume, or another --out")
        results = read_json(file)
        if results["settings"] != settings:
            raise ExperimentError(f"--resume needs the settings that the run in {out} began with: {results['settings']}")
        earlier = others([results["versions"], *results.get("earlier_versions", [])], made_with["versions"])
        results |= made_with | ({"earlier_versions": earlier} if earlier else {})
    wanted = cells(seeds)
    for cell in track([cell for cell in wanted if cell.name not in results["cells"]], "runs", len(wanted)):
        results["cells"][cell.name] = train(cell, steps)
        write_json(file, results)
    return results


def table(results: dict[str, Any], seeds: int) -> str:
    """One row a coefficient; the chosen one of each way is bold."""

    def mean(way: str, coefficient: float, what: str) -> dict[str, Any]:
        return interval([results["cells"][Cell(seed, way, coefficient).name][what] for seed in range(seeds)])

    bound = mean("none", 0.0, "task")["mean"] + SLACK
    lines = ["| penalty | α | task loss | mean stable rank of 8 | lowest gate | drift of σ |", "|---|---|---|---|---|---|"]
    for way, coefficients in (("none", (0.0,)), *((way, COEFFICIENTS) for way in WAYS)):
        fair = [c for c in coefficients if mean(way, c, "task")["mean"] <= bound]
        chosen = max(fair, key=lambda c: mean(way, c, "stable_rank")["mean"], default=None) if way != "none" else None
        for coefficient in coefficients:
            found = [mean(way, coefficient, what) for what in ("task", "stable_rank", "lowest_rank", "sigma_drift")]
            shown = [f"{value['mean']:.3f} ± {value['ci95'] or 0:.3f}" for value in found]
            row = [way, f"{coefficient:g}", *shown]
            lines.append("| " + " | ".join(f"**{cell}**" if coefficient == chosen else cell for cell in row) + " |")
    note = f"Mean ± half-width of the 95 % interval (Student's t) over {seeds} seeds. Bold: the largest stable rank at a task "
    return "\n".join([*lines, "", f"{note}loss within {SLACK} of none.", ""])
