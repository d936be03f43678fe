"""Which setting is put to the test: rules that study.toml states in words, on validation images of tuning seeds alone."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from examples.image_classification.plasticity import interference

from .protocol import Protocol, Settings, label, sweep_arms

Record = dict[str, Any]
TOGETHER = 3  # so many of the best single changes are candidates of their own


def candidates(protocol: Protocol, swept: list[Record]) -> dict[str, Settings]:
    """The arms of the second stage, by name: the center, the best single changes, and the best levels together."""
    center = protocol["sweep"]["center"]
    accuracies = {name: fmean(record["accuracy"] for record in swept if record["arm"] == name) for name in _names(swept)}
    harm = {name: cost(protocol, [record for record in swept if record["arm"] == name]) for name in _names(swept)}
    better: dict[str, tuple[float, Settings]] = {}  # by factor: the best level that passes
    for factor, levels in protocol["sweep"]["factors"].items():
        for level in levels:
            changes = level if isinstance(level, dict) else {factor: level}
            name = label(changes)
            if accuracies[name] <= accuracies[center] or not _no_worse(harm[name], harm[center]):
                continue
            if factor not in better or accuracies[name] > better[factor][0]:
                better[factor] = accuracies[name], changes
    singles = sorted(better.values(), key=lambda item: -item[0])
    arms = {center: sweep_arms(protocol)[center]}
    for _, changes in singles[:TOGETHER]:
        arms[label(changes)] = {"routers": [center], **changes}
    if len(singles) > 1:
        # of two factors that set one field (alpha, raw and relative) the more accurate level comes last and stays
        together = {key: value for _, changes in reversed(singles) for key, value in changes.items()}
        arms[label(together)] = {"routers": [center], **together}
    return arms


def winner(tried: list[Record]) -> str:
    """The candidate with the highest mean validation accuracy; of equals the first."""
    return max(_names(tried), key=lambda name: fmean(record["accuracy"] for record in tried if record["arm"] == name))


def cost(protocol: Protocol, records: list[Record]) -> float | None:
    """Mean delta at equal plasticity by the sweep's first rule, over the seeds that trained; None if one does not reach it."""
    rule = next(rule for rule in protocol["oneshot"]["rules"] if rule["name"] == protocol["sweep"]["rules"][0])
    trained = [record for record in records if record["accuracy"] >= protocol["failed"]["accuracy_below"]]
    deltas = [interference(curve(record, rule), rule["plasticity"]) for record in trained]
    known = [delta for delta in deltas if delta is not None]
    return fmean(known) if known and len(known) == len(deltas) else None


def curve(record: Record, rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of one rule, ascending in rate, as `interference` reads them."""
    points = [
        {"delta": point["mean_delta"], "loss_before": point["novel_loss_before"], "loss_after": point["novel_loss_after"]}
        | {"lr": point["lr"]}
        for point in record["oneshot"]
        if point["scope"] == rule["scope"] and point["optimizer"] == rule["optimizer"]
    ]
    return sorted(points, key=lambda point: point["lr"])


def _names(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(record["arm"] for record in records))


def _no_worse(delta: float | None, reference: float | None) -> bool:
    return reference is None or (delta is not None and delta >= reference)
