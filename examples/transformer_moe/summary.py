"""The numbers of a run, their means and intervals over seeds, and the differences between arms, paired by seed."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from examples.shared.runs import interval

Part = dict[str, Any]
Scalars = dict[str, float | None]
Curve = list[float | None]
REFERENCES = ("none", "own")
PER_LAYER = (
    "load_cv",
    "max_share",
    "dead",
    "stable_rank",
    "spectral_norm",
    "cosine",
    "specialisation",
    "specialisation_chance",
)


def of(parts: dict[str, list[Part]], adapted: str | None) -> dict[str, Any]:
    """`summary`: for each arm mean and 95 % interval of each number. `differences`: to none and to own, in the same form."""
    rows = {arm: [scalars(part, adapted) for part in of_arm] for arm, of_arm in parts.items()}
    if adapted is not None:
        for number in range(min(len(of_arm) for of_arm in rows.values())):
            at_equal_gain(
                [of_arm[number]["adapt"] for of_arm in parts.values()], [row[number] for row in rows.values()], adapted
            )
    for mine in rows.values() if "none" in rows else ():
        for row, base in zip(mine, rows["none"], strict=True):
            row["speed"] = _ratio(row["tokens_per_second"], base["tokens_per_second"])
    return {
        "summary": {arm: {name: interval([row[name] for row in of_arm]) for name in of_arm[0]} for arm, of_arm in rows.items()},
        "differences": {
            reference: {
                arm: {name: difference(of_arm, rows[reference], name) for name in of_arm[0]}
                for arm, of_arm in rows.items()
                if arm != reference
            }
            for reference in REFERENCES
            if reference in rows
        },
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base


def difference(mine: list[Scalars], theirs: list[Scalars], name: str) -> dict[str, Any]:
    pairs = [(one[name], other[name]) for one, other in zip(mine, theirs, strict=True)]
    return interval([_difference(one, other) for one, other in pairs])


def scalars(part: Part, adapted: str | None) -> Scalars:
    """Of the trained model; a layer's as name/layer, without a layer the mean over them (of dead experts the sum).

    None where a number is not finite, as in a diverged run.
    """
    train = part["train"]
    last = train["history"][-1]
    numbers: Scalars = {"loss": last["loss"]}
    numbers |= {f"loss/{name}": loss for name, loss in last["domains"].items()}
    layers: dict[str, list[float | None]] = {name: last[name] for name in PER_LAYER}
    layers["fluctuation"] = [*late_fluctuation(train["history"])]
    for name, values in layers.items():
        numbers |= {f"{name}/{layer}": value for layer, value in enumerate(values, 1)}
        numbers[name] = _mean(values)
    numbers["dead"] = sum(last["dead"])
    numbers["max_share"] = max(last["max_share"])
    numbers["stable_rank_min"] = None if None in last["stable_rank"] else min(last["stable_rank"])
    numbers["tokens_per_second"] = train.get("tokens_per_second")
    if adapted is not None:
        gains, losses = adaptation(part["adapt"], adapted)
        numbers |= {"gain": gains[-1], "forgetting": losses[-1]}
    return numbers


def late_fluctuation(history: list[dict[str, Any]]) -> list[float]:
    """By layer: the mean over the second half of the measurements, when the routing has settled."""
    moves = [row["fluctuation"] for row in history[1:]]
    late = moves[len(moves) // 2 :]
    return [fmean(of_layer) for of_layer in zip(*late, strict=True)]


def adaptation(phase: dict[str, Any], domain: str) -> tuple[Curve, Curve]:
    """At each measurement: what the domain has gained, and what the others have lost on average, in nats a byte.

    None where a loss is not finite.
    """
    first = phase["history"][0]["domains"]
    others = [name for name in first if name != domain]
    rises = [{name: _difference(row["domains"][name], first[name]) for name in first} for row in phase["history"]]
    gains = [_difference(0.0, rise[domain]) for rise in rises]
    return gains, [_mean([rise[name] for name in others]) for rise in rises]


def _difference(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def at_equal_gain(phases: list[dict[str, Any]], rows: list[Scalars], domain: str) -> None:
    """What the others have lost when the domain has gained as much in every arm of a seed: as in the arm of least gain.

    An arm with a loss that is not finite has no part in it.
    """
    curves = [finite(*adaptation(phase, domain)) for phase in phases]
    common = min((max(gains) for gains, _ in filter(None, curves)), default=0.0)
    for curve, row in zip(curves, rows, strict=True):
        row["common_gain"] = None if curve is None else common
        row["forgetting_at_common_gain"] = when(*curve, common) if curve is not None and common > 0 else None


def finite(gains: Curve, losses: Curve) -> tuple[list[float], list[float]] | None:
    known = [(gain, loss) for gain, loss in zip(gains, losses, strict=True) if gain is not None and loss is not None]
    return ([gain for gain, _ in known], [loss for _, loss in known]) if len(known) == len(gains) else None


def when(gains: list[float], losses: list[float], target: float) -> float | None:
    """The loss on the line between the two measurements where the gain first reaches the target."""
    for index in range(1, len(gains)):
        before, after = gains[index - 1], gains[index]
        if after >= target:
            part = (target - before) / (after - before) if after > before else 1.0
            return losses[index - 1] + part * (losses[index] - losses[index - 1])
    return None
