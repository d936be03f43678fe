"""The numbers of the fine-tuning study: means, intervals, differences to `none` paired by seed; and its tables."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from examples.shared.runs import interval

from .report import Rows, cell, publish
from .summary import Curve, Part, Scalars, adaptation, at_equal_gain, difference, finite, when

# label, name, format
SHOWN = (
    ("New domain: gain, nats/byte", "gain", ".4f"),
    ("Old domains: loss given up", "forgetting", "+.4f"),
    ("the same, at equal gain", "forgetting_at_common_gain", "+.4f"),
    ("Validation loss, all domains, nats/byte", "loss", ".4f"),
    ("Old domains: tokens rerouted", "rerouted_old", ".3f"),
    ("the same, at equal gain", "rerouted_at_common_gain", ".3f"),
    ("New domain: tokens rerouted", "rerouted_new", ".3f"),
    ("Stable rank of the gates, before", "stable_rank_before", ".3f"),
    ("Stable rank of the gates, after", "stable_rank", ".3f"),
    ("Spectral norm of the gates, before", "spectral_norm_before", ".3f"),
    ("Spectral norm of the gates, after", "spectral_norm", ".3f"),
    ("Load CV, mean of layers", "load_cv", ".3f"),
    ("Dead experts, all layers", "dead", ".1f"),
)


def of(parts: dict[str, list[Part]], domain: str) -> dict[str, Any]:
    """`summary`: for each arm mean and 95 % interval of each number; `differences`: to none, in the same form."""
    rows = {arm: [scalars(part["finetune"], domain) for part in of_arm] for arm, of_arm in parts.items()}
    for number in range(min(len(of_arm) for of_arm in rows.values())):
        phases = [of_arm[number]["finetune"] for of_arm in parts.values()]
        seeds = [of_arm[number] for of_arm in rows.values()]
        at_equal_gain(phases, seeds, domain)
        for phase, row in zip(phases, seeds, strict=True):
            row["rerouted_at_common_gain"] = _at(row["common_gain"], adaptation(phase, domain)[0], rerouted(phase, domain))
    return {
        "summary": {arm: {name: interval([row[name] for row in of_arm]) for name in of_arm[0]} for arm, of_arm in rows.items()},
        "differences": {
            arm: {name: difference(of_arm, rows["none"], name) for name in of_arm[0]}
            for arm, of_arm in rows.items()
            if arm != "none" and "none" in rows
        },
    }


def _at(gain: float | None, gains: Curve, shares: Curve) -> float | None:
    curves = finite(gains, shares)
    return None if curves is None or not gain or gain < 0 else when(*curves, gain)


def scalars(phase: dict[str, Any], domain: str) -> Scalars:
    """Of one fine-tuning; of gates the mean over layers. None where a number is not finite."""
    first, last = phase["history"][0], phase["history"][-1]
    gains, losses = adaptation(phase, domain)
    numbers: Scalars = {"gain": gains[-1], "forgetting": losses[-1], "loss": last["loss"], "dead": sum(last["dead"])}
    numbers |= {"rerouted_old": rerouted(phase, domain)[-1], "rerouted_new": last["rerouted"][domain]}
    for name, values in {
        "stable_rank_before": first["stable_rank"],
        "stable_rank": last["stable_rank"],
        "spectral_norm_before": first["spectral_norm"],
        "spectral_norm": last["spectral_norm"],
        "load_cv": last["load_cv"],
    }.items():
        numbers[name] = None if None in values else fmean(values)
    return numbers


def rerouted(phase: dict[str, Any], domain: str) -> Curve:
    """At each measurement: of the old domains' tokens the share whose set of experts is another one than at the start."""
    return [fmean(share for name, share in row["rerouted"].items() if name != domain) for row in phase["history"]]


def write(results: dict[str, Any], out: Path) -> None:
    """Print the tables and write them to tables.md."""
    tables = [(title(results), table_rows(results["summary"], False), list(results["summary"]))]
    if results["differences"]:
        rows = table_rows(results["differences"], True)
        tables.append(("Differences to none, paired by seed", rows, list(results["differences"])))
    publish(tables, footnote(results), out, "####")


def table_rows(arms: dict[str, dict[str, Any]], signed: bool) -> Rows:
    return [
        (label, [cell(of_arm[name], "+" + form.lstrip("+") if signed else form) for of_arm in arms.values()])
        for label, name, form in SHOWN
        if not (signed and name.endswith("_before"))  # the same model
    ]


def title(results: dict[str, Any]) -> str:
    config = results["config"]
    network = config["model"] or f"{config['architecture']}, {config['experts']} experts a layer, top {config['top_k']}"
    return (
        f"{network}, {len(results['gates'])} gates, {results['parameters']:,} parameters, {config['steps']} steps on all "
        f"domains, then {config['adapt_steps']} on {results['domain']}, seeds {len(results['seeds'])}"
    )


def footnote(results: dict[str, Any]) -> str:
    config, seeds = results["config"], len(results["seeds"])
    spread = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t)." if seeds > 1 else "One seed: no intervals."
    )
    return (
        f"{spread} Coefficients: penalty {config['alpha']}, balance {config['beta']}. Learning rate {config['adapt_lr']}. "
        f"Rerouted: share of the validation tokens whose set of {config['top_k']} experts is another one than before "
        "fine-tuning, mean of layers. Equal gain: that of the arm that gains least with the same seed."
    )
