"""Callbacks for the trainers that people use; each module is imported by name, so that nothing here asks for a trainer."""

from __future__ import annotations

import math

from ..wrap.handle import MoEHandle

__all__ = ["router_metrics"]


def router_metrics(handle: MoEHandle, per_gate: bool = False) -> dict[str, float]:
    """What the callbacks log: `handle.metrics()` in a few numbers, each key under "router/".

    loss is the sum over the gates: the whole term of the last forward. penalty, balance, sigma_max, stable_rank and entropy
    are means over the gates. stable_rank_min, the smallest, and max_share, the largest, are those of the worst gate, which a
    mean would hide; dead is the number of dead experts in all gates. Gates that nothing was measured of, such as frozen ones,
    are left out of what needs a training forward.

    Args:
        handle: of a wrapped model.
        per_gate: also every number of every gate, under "router/<gate's name>/".

    >>> from torch import nn
    >>> from spectral_router import wrap_moe
    >>> experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    >>> model = nn.ModuleDict({"router": nn.Linear(16, 4), "experts": experts})
    >>> list(router_metrics(wrap_moe(model)))[:4]
    ['router/loss', 'router/penalty', 'router/balance', 'router/sigma_max']
    """
    rows = handle.metrics()
    columns = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
    measured = {name: [value for value in column if not math.isnan(value)] for name, column in columns.items()}
    report = {"loss": sum(measured["loss"])}
    for name in ("penalty", "balance", "sigma_max", "stable_rank", "entropy"):
        # a weight that has become not-a-number is not left out
        report[name] = _mean(measured[name] if name in ("balance", "entropy") else columns[name])
    report["stable_rank_min"] = min(columns["stable_rank"])
    report["max_share"] = max(measured["max_share"], default=math.nan)
    report["dead"] = sum(measured["dead"])
    if per_gate:
        report |= {f"{gate}/{name}": value for gate, row in rows.items() for name, value in row.items()}
    return {f"router/{name}": value for name, value in report.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
