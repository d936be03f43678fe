"""Made-up records in the form of `studies.reproduction.run.record`, to try the page on without a study."""

from __future__ import annotations

import random
from typing import Any

from studies.reproduction import protocol
from studies.reproduction.protocol import Run

RULES = protocol.read()["oneshot"]["rules"]
SKILL = {"baseline": -3.0, "spectral": 1.0}  # points above or below the others


def plan(seeds: int = 3) -> protocol.Protocol:
    """study.toml with a few seeds in every stage."""
    plan = protocol.read()
    for stage in ("main", "sweep", "second", "confirm", "failure"):
        plan[stage]["seeds"] = [plan[stage]["seeds"][0], seeds]
    return plan


def results(plan: protocol.Protocol, photos: bool = True) -> dict[str, Any]:
    """What `saved.read` gives of a whole study, or of one without the photos."""
    places = {"photos": "there"} if photos else {}
    runs = protocol.runs(plan, "main", places)
    if photos:
        runs += protocol.runs(plan, "sweep", places) + protocol.runs(plan, "failure", places)
        better = {"routers": ["spectral"], "temperature": 0.3, "residual": True}
        tried = {"spectral": {"routers": ["spectral"]}, "temperature 0.3, residual true": better}
        runs += protocol.runs(plan, "second", places, tried)
        chosen = {router: {"routers": [router]} for router in plan["confirm"]["routers"]} | dict([list(tried.items())[1]])
        runs += protocol.runs(plan, "confirm", places, chosen)
    return {
        "protocol": plan,
        "versions": [{"python": "3.12.0", "spectral-router": "0.0", "torch": "2.15.0"}],
        "devices": ["cpu"],
        "data": {one.phase: {"digest": "0" * 64, "classes": one.config.classes, "images": 960} for one in runs},
        "runs": [record(one) for one in runs],
    }


def record(one: Run) -> dict[str, Any]:
    """Of one run, the same every time."""
    config, dice = one.config, random.Random(one.name)
    layers, experts, classes = config.layers, config.experts, list(config.classes or ())
    failed = config.routers[0] == "baseline" and dice.random() < (0.7 if config.lr > 1e-3 else 0.1)
    skill = SKILL.get(config.routers[0], 0.0) - (5.0 if config.metric == "dot" else 0.0)
    paths = ["-".join(["1"] * layers)] if failed else [_path(dice, layers, experts) for _ in range(3 + layers)]
    counts = {path: [36 if failed else dice.randint(0, 12) for _ in classes] for path in paths}
    loss = 1.4 if failed else dice.uniform(0.2, 0.5)

    def by_layer(low: float, high: float) -> list[float]:
        return [dice.uniform(low, high) for _ in range(layers)]

    routing = {
        "paths_used": len(counts),
        "paths_used_1pct": len(counts),
        "top_path_share": 1.0 if failed else dice.uniform(0.2, 0.6),
        "class_paths": {name: {"path": next(iter(counts)), "share": 0.8} for name in classes},
        "dominant_paths": 1 if failed else dice.randint(2, 4),
        "mutual_information": 0.0 if failed else dice.uniform(0.6, 0.9),
        "mutual_information_chance": 0.05,
        "path_counts": counts,
        "expert_share": [[[1 / experts] * len(classes)] * experts] * layers,
        "importance_cv2": by_layer(0, 1),
        "load_cv2": by_layer(0, 1),
        "entropy": by_layer(0.3, 0.9),
    }
    if one.seed >= 3:
        del routing["path_counts"]
    shown = {
        "stage": one.stage,
        "phase": one.phase,
        "arm": one.arm,
        "seed": one.seed,
        "training_seconds": dice.uniform(20, 30),
        "accuracy": 25.0 if failed else 90 + skill + dice.gauss(0, 1.5),
        "routing": routing,
        "spectral_norm": by_layer(0.8, 1.2),
        "stable_rank": by_layer(1, experts),
        "val_accuracy": [60.0 + 2 * epoch + (7 * epoch + 3 * one.seed) % 5 for epoch in range(config.epochs)],
        "task": [1.0, 0.3],
        "oneshot": [],
    }
    if one.rules:
        shown["gradient_norm"] = [[10 ** dice.uniform(-12 if failed else -2, 0) for _ in range(experts)] for _ in range(layers)]
    for rule in one.rules:
        (rates,) = (entry["rates"] for entry in RULES if (entry["scope"], entry["optimizer"]) == (rule.scope, rule.optimizer))
        learned = (0.0 if failed else 0.18) * 1.6 ** (rates.index(rule.lr)) * dice.uniform(0.7, 1.4)
        delta = {name: 0.0 if failed else dice.gauss(-0.4, 0.4) * learned * 4 for name in classes}
        diverged = rule.optimizer == "sgd" and rule.lr == max(rates) and dice.random() < 0.1
        shown["oneshot"].append(
            rule._asdict()
            | {
                "delta": delta,
                "mean_delta": sum(delta.values()) / len(delta),
                "novel_loss_before": loss,
                "novel_loss_after": None if diverged else loss * (1 - learned),
                "novel_accuracy_before": 25.0 if failed else 88.0,
                "novel_accuracy_after": 25.0 if failed else 91.0,
            }
        )
    return shown


def _path(dice: random.Random, layers: int, experts: int) -> str:
    return "-".join(str(dice.randint(1, experts)) for _ in range(layers))
