"""Which setting is put to the test: rules that study.toml states in words, on validation images of tuning seeds alone."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from studies.oneshot.plasticity import interference

from .protocol import Protocol, Settings, label, rule_of, sweep_arms

Record = dict[str, Any]
TOGETHER = 3  # so many of the best single changes are candidates of their own


def candidates(protocol: Protocol, swept: list[Record]) -> dict[str, Settings]:
    """The arms of the second stage, by name: the center, the best single changes, and the best levels together."""
    center = protocol["sweep"]["center"]
    better: dict[str, tuple[float, Settings]] = {}  # by factor: the best level that passes
    for factor, levels in protocol["sweep"]["factors"].items():
        for level in levels:
            changes = level if isinstance(level, dict) else {factor: level}
            name = label(changes)
            accuracy = _accuracy(_of(swept, name))
            if all(passes(protocol, swept, name)) and (factor not in better or accuracy > better[factor][0]):
                better[factor] = accuracy, changes
    singles = sorted(better.values(), key=lambda item: -item[0])
    arms = {center: sweep_arms(protocol)[center]}
    for _, changes in singles[:TOGETHER]:
        arms[label(changes)] = {"routers": [center], **changes}
    if len(singles) > 1:
        # of two factors that set one field (alpha, raw and relative) the more accurate level comes last and stays
        together = {key: value for _, changes in reversed(singles) for key, value in changes.items()}
        arms[label(together)] = {"routers": [center], **together}
    return arms


def passes(protocol: Protocol, swept: list[Record], name: str) -> tuple[bool, bool]:
    """Whether a level of the sweep is more accurate than the center, and its interference not above the center's."""
    level, center = _of(swept, name), _of(swept, protocol["sweep"]["center"])
    delta, reference = cost(protocol, level), cost(protocol, center)
    return _accuracy(level) > _accuracy(center), reference is None or (delta is not None and delta >= reference)


def winner(tried: list[Record]) -> str:
    """The candidate with the highest mean validation accuracy; of equals the first."""
    return max(_names(tried), key=lambda name: _accuracy(_of(tried, name)))


def cost(protocol: Protocol, records: list[Record]) -> float | None:
    """Mean delta at equal plasticity by the sweep's first rule, over the seeds that trained; None if one does not reach it."""
    rule = rule_of(protocol, protocol["sweep"]["rules"][0])
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


def _of(records: list[Record], name: str) -> list[Record]:
    return [record for record in records if record["arm"] == name]


def _accuracy(records: list[Record]) -> float:
    return fmean(record["accuracy"] for record in records)
