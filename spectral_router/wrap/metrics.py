"""Numbers about the routers of a wrapped model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..balance.formulas import load_balance_loss
from ..penalties.formulas import spectral_norm, stable_rank
from .recorder import Recorder
from .weights import full_weight

# an expert whose share of the routing probability is below this part of an even share counts as dead
_DEAD = 0.01


@torch.no_grad()
def measure(recorder: Recorder) -> dict[str, dict[str, float]]:
    """For each gate what `MoEHandle.metrics` says."""
    weights = [full_weight(gate).detach() for gate in recorder.gates]
    penalties = _penalties(recorder, weights)
    drifts = _drifts(recorder, weights)
    measured = any(share is not None for share in recorder.shares)  # there has been a forward
    report = {}
    for index, (gate, weight, penalty) in enumerate(zip(recorder.gates, weights, penalties, strict=True)):
        row = {"sigma_max": spectral_norm(weight).item(), "stable_rank": stable_rank(weight).item(), "penalty": penalty}
        row |= {"sigma_drift": drifts[index][0], "rank_drift": drifts[index][1]}
        row |= _of_share(recorder.shares[index])
        if measured:
            balance = recorder.balances[index]
            row["loss"] = recorder.penalty_coef * penalty + recorder.balance_coef * (0.0 if balance is None else balance.item())
        else:
            row["loss"] = math.nan
        report[gate.name] = row
    return report


def _of_share(share: Tensor | None) -> dict[str, float]:
    """Of the mean probability of each expert, which sums to one; NaN if there is none."""
    if share is None:
        return dict.fromkeys(("balance", "entropy", "max_share", "dead"), math.nan)
    entropy = -torch.special.xlogy(share, share).sum() / math.log(max(len(share), 2))
    return {
        "balance": load_balance_loss(share).item(),
        "entropy": entropy.item(),
        "max_share": share.max().item(),
        "dead": float((share < _DEAD / len(share)).sum()),
    }


def _drifts(recorder: Recorder, weights: list[Tensor]) -> list[tuple[float, float]]:
    """Of each gate: by what share of its anchors σ_max and the stable rank have moved; NaN under a penalty without anchors."""
    values = [(math.nan, math.nan)] * len(weights)
    drift = getattr(recorder.penalty, "drift", None)
    # where nothing learns, the penalty has seen nothing
    if drift is None or not any(recorder.learning()):
        return values
    moved = zip(*drift([weights[group[0]] for group in recorder.ties]), strict=True)
    for group, (norm, rank) in zip(recorder.ties, moved, strict=True):
        for index in group:
            values[index] = (norm.item(), rank.item())
    return values


def _penalties(recorder: Recorder, weights: list[Tensor]) -> list[float]:
    """Of each gate: zero if it is frozen; of tied ones the first carries the penalty, as in the term."""
    values = [0.0] * len(weights)
    learning = recorder.learning()
    if recorder.penalty is None or not any(learning):
        return values
    firsts = [group[0] for group in recorder.ties]
    each = getattr(recorder.penalty, "each", None)
    if each is not None:
        parts = each([weights[first] for first in firsts])
    else:  # anyone's callable: one gate at a time
        parts = [recorder.penalty([weights[first]]) for first in firsts]
    for first, part, learns in zip(firsts, parts, learning, strict=True):
        values[first] = float(part) if learns else 0.0
    return values
