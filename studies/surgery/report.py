"""Gain and forgetting by scope: means and intervals over seeds, differences paired by seed, as a table."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from examples.image_classification.report import markdown
from examples.shared.runs import interval
from examples.shared.storage import write_text
from examples.transformer_moe.config import SCOPES
from examples.transformer_moe.report import cell
from examples.transformer_moe.summary import adaptation, finite, when

EVERY = "mean of domains"
# label, name, format
SHOWN = (
    ("gain at the end, nats/byte", "gain", ".4f"),
    ("others give up at the end", "forgetting", "+.4f"),
    ("others give up at equal gain", "forgetting_at_equal_gain", "+.4f"),
    ("the same, against everything free", "difference", "+.4f"),
    ("experts free, of all", "free", ".3f"),
)
NAMES = {
    "gain": "gain at the end",
    "forgetting_at_equal_gain": "others give up at equal gain",
    "difference": "the same, less that of all",
    "free": "experts free",
}
HEADLINE = (
    ("all", "gain", ".3f"),
    ("experts", "gain", ".3f"),
    ("path", "gain", ".3f"),
    ("all", "forgetting_at_equal_gain", "+.4f"),
    ("experts", "difference", "+.4f"),
    ("path", "difference", "+.4f"),
    ("path", "free", ".2f"),
)


def of(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`summary`: arm -> domain -> scope -> name -> {mean, ci95, n}, of the seeds that are complete."""
    numbers: dict[tuple[str, str], dict[int, dict[str, dict[str, float | None]]]] = {}
    for part in parts:
        numbers.setdefault((part["arm"], part["domain"]), {}).setdefault(part["seed"], {})[part["scope"]] = part
    summary: dict[str, dict[str, Any]] = {}
    for (arm, domain), seeds in numbers.items():
        rows = [_at_equal_gain(scopes, domain) for scopes in seeds.values()]
        summary.setdefault(arm, {})[domain] = rows
    found: dict[str, dict[str, Any]] = {}
    for arm, domains in summary.items():
        seeds_of = list(zip(*domains.values(), strict=False))
        mean = [
            {scope: {name: _mean([row[scope][name] for row in rows]) for name in rows[0][scope]} for scope in SCOPES}
            for rows in seeds_of
        ]
        for domain, rows in {**domains, EVERY: mean}.items():
            found.setdefault(arm, {})[domain] = {
                scope: {name: interval([row[scope][name] for row in rows]) for name in rows[0][scope]} for scope in SCOPES
            }
    return {"summary": found}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _at_equal_gain(scopes: dict[str, Any], domain: str) -> dict[str, dict[str, float | None]]:
    """Of one seed, arm and domain: the numbers of each scope."""
    curves = {scope: finite(*adaptation(phase, domain)) for scope, phase in scopes.items()}
    common = min((max(gains) for gains, _ in filter(None, curves.values())), default=0.0)
    found: dict[str, dict[str, float | None]] = {}
    for scope, curve in curves.items():
        numbers: dict[str, float | None] = dict.fromkeys([name for _, name, _ in SHOWN])
        if curve is not None:
            numbers |= {"gain": curve[0][-1], "forgetting": curve[1][-1]}
            numbers["forgetting_at_equal_gain"] = when(*curve, common) if common > 0 else None
        path = scopes[scope].get("path")
        count = sum(len(of_layer) for of_layer in scopes[scope]["history"][0]["load"])
        numbers["free"] = 1.0 if path is None else sum(len(experts) for experts in path.values()) / count
        found[scope] = numbers
    base = found["all"]["forgetting_at_equal_gain"]
    for numbers in found.values():
        mine = numbers["forgetting_at_equal_gain"]
        numbers["difference"] = None if mine is None or base is None else mine - base
    return found


def write(results: dict[str, Any], out: Path) -> None:
    """tables.md: the means over the domains, an arm a row; then everything, one fold an arm."""
    rows = [
        (arm, [cell(domains[EVERY][scope][name], form) for scope, name, form in HEADLINE])
        for arm, domains in results["summary"].items()
    ]
    parts = [markdown(rows, [f"{scope}: {NAMES[name]}" for scope, name, _ in HEADLINE])]
    for arm, domains in results["summary"].items():
        rows = [
            (f"{domain}: {label}", [cell(scopes[scope][name], form) for scope in SCOPES])
            for domain, scopes in domains.items()
            for label, name, form in SHOWN
        ]
        seeds = domains[EVERY]["all"]["gain"]["n"]
        table = markdown(rows, list(SCOPES)).strip().replace("\n", "\n    ")
        parts.append(f'??? note "Arm {arm}: every domain, {seeds} seeds"\n\n    {table}\n')
    write_text(out / "tables.md", "\n".join(parts))
