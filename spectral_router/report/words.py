"""The same short texts for table and page: labels of gates, numbers, the rows of both tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .comparison import Comparison
from .gate_report import GateReport
from .inspection import CheckpointReport

INSPECTED = ("gate", "σ max", "stable rank", "centred", "effective", "condition", "energy", "row norms", "closest", "verdict")
COMPARED = ("gate", "change", "row cosine", "angle", "stable rank", "σ max", "certified", "swapped", "verdict now")
WITH_DATA = ("gate", "tokens", "busiest", "idle", "margin", "radius", "relative", "bf16", "fp8", "int8")
OVER_TIME = ("checkpoint", "σ max", "stable rank", "centred", "closest", "change", "certified", "not healthy")


def labels(names: Sequence[str]) -> list[str]:
    """The part of each name that tells it from the others: layer numbers where these are enough."""
    layers = [(re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name) or [""])[-1] for name in names]
    counts = Counter(layers)
    if counts[""] == 0 and max(counts.values()) == 1:
        return layers
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    if value in (float("inf"), float("-inf")) or abs(value) >= 1e6:
        return "> 1e6" if value > 0 else "< -1e6"
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def share(value: float) -> str:
    """A percentage that says 100 % only of all."""
    percent = 100 * value
    return f"{percent:.0f} %" if percent in (0, 100) else f"{min(max(percent, 0.1), 99.9):.1f} %"


def percent(value: float) -> str:
    return f"{number(100 * value)} %"


def heading(report: CheckpointReport) -> str:
    shapes = Counter((gate.num_experts, gate.dim) for gate in report.gates)
    sizes = ", ".join(f"{count} of {k} experts x {d}" for (k, d), count in shapes.items())
    top = "" if report.top_k is None else f", top {report.top_k}"
    model = "" if report.model is None else f"{report.model}, "
    return f"{report.path}: {model}{report.kind}; gates: {sizes}{top}"


def inspected_row(gate: GateReport, label: str) -> list[str]:
    found = gate.geometry
    if found is None:
        return [label, *["–"] * (len(INSPECTED) - 2), gate.verdict]
    most = min(gate.num_experts, gate.dim)
    pair = "–"
    if gate.closest_pairs:
        i, j, cosine, _ = gate.closest_pairs[0]
        pair = f"{i}, {j}: {cosine:.2f}"
    return [
        label,
        number(found.spectral_norm),
        f"{number(found.stable_rank)} of {most}",
        number(found.centred_stable_rank),
        number(found.effective_rank),
        number(found.condition),
        number(found.energy),
        f"{number(found.row_norms.min().item())} to {number(found.row_norms.max().item())}",
        pair,
        gate.verdict,
    ]


def fresh_rows(report: CheckpointReport) -> list[list[str]]:
    """What fresh gates have, one row a shape."""
    rows = []
    shapes = {(gate.num_experts, gate.dim): gate.fresh for gate in report.gates}
    for (k, d), usual in shapes.items():
        label = "fresh" if len(shapes) == 1 else f"fresh {k} x {d}"
        names = ("stable_rank", "centred_stable_rank", "effective_rank", "condition", "energy")
        rank, *rest = (number(usual[name][1]) for name in names)
        rows.append([label, "", f"{rank} of {min(k, d)}", *rest, "", "", ""])
    return rows


def compared_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for gate, label in zip(comparison.gates, labels([gate.name for gate in comparison.gates]), strict=True):
        pair = [g.geometry for g in (gate.before, gate.after)]
        ranks = " → ".join("–" if g is None else number(g.stable_rank) for g in pair)
        norms = " → ".join("–" if g is None else number(g.spectral_norm) for g in pair)
        swapped = ", ".join(f"{i}↔{j}" for i, j in gate.swapped[:4]) or (f"{len(gate.taken)} taken" if gate.taken else "")
        angle = f"{gate.angles.max().rad2deg():.1f}°" if len(gate.angles) else "–"
        least = number(gate.row_cosines.min().item())
        rows.append(
            [label, percent(gate.change), least, angle, ranks, norms, share(gate.certified_share), swapped, gate.after.verdict]
        )
    return rows


def over_time_rows(reports: Sequence[CheckpointReport], drifts: Sequence[Comparison]) -> list[list[str]]:
    """One row a checkpoint: medians over its gates, and its drift from the first one."""
    rows = []
    for report, drift in zip(reports, drifts, strict=True):
        depth = report.over_depth()
        medians = [
            number(depth[name]["median"]) if name in depth else "–"
            for name in ("spectral_norm", "stable_rank", "centred_stable_rank", "closest")
        ]
        changes = sorted(gate.change for gate in drift.gates)
        certified = min(gate.certified_share for gate in drift.gates)
        ill = sum(gate.verdict != "healthy" for gate in report.gates)
        rows.append(
            [report.path, *medians, percent(changes[len(changes) // 2]), share(certified), f"{ill} of {len(report.gates)}"]
        )
    return rows


def data_rows(told: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What a batch made of each gate: the busiest expert's share of choices, experts without a token, medians, flips."""
    rows = []
    for (_, gate), label in zip(told.items(), labels(list(told)), strict=True):
        medians = ["–" if gate[name] is None else number(gate[name]["50%"]) for name in ("margin", "radius", "relative_radius")]
        flips = ["–" if gate["flips"] is None else percent(gate["flips"][name]) for name in ("bf16", "fp8", "int8")]
        idle = sum(load == 0 for load in gate["load"])
        rows.append([label, str(gate["tokens"]), percent(max(gate["load"])), str(idle), *medians, *flips])
    return rows


def candidates(gates: Sequence[GateReport], comparison: Comparison | None = None) -> list[tuple[str, str, str]]:
    """(gate, what to do, why), for experts that may be merged or pruned."""
    told = []
    names = labels([gate.name for gate in gates])
    for gate, label in zip(gates, names, strict=True):
        for verdict in gate.verdicts:
            if verdict.word == "duplicates":
                told.append((label, f"merge {', '.join(map(str, verdict.experts))}", verdict.rule))
            if verdict.word in ("dead-looking", "closed"):
                told.append((label, f"prune {', '.join(map(str, verdict.experts))}", verdict.rule))
    if comparison is not None:
        for drift, label in zip(comparison.gates, labels([gate.name for gate in comparison.gates]), strict=True):
            told += [(label, f"prune {expert}", reason) for expert, reason in drift.pruning]
    return told
