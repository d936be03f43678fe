"""What the numbers of a gate mean, in plain words, and the rule behind each word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry

COLLAPSED = 1.5  # centred stable rank below which one direction orders all experts
# Of the way from 1 to a fresh gate's centred stable rank. Models that work are well below the fresh one: over layers, stable
# ranks are near 6.8 of 64 in OLMoE-1B-7B, where this is at 5.5, and 2.1 of 16 in Phi-3.5-MoE, where it is at 2.3.
NARROW = 0.1
ALIKE = 0.01  # part of the energy that tells the rows apart
CLOSE = 0.2  # of the median distance: two rows for one
QUIET = 0.1  # of the median length: a row that is next to none
LOUD = 4.0  # times the median length
_MANY = 8  # experts that a verdict names


@dataclass(frozen=True)
class Verdict:
    """word: what it is; experts: whom it is about, all if empty; rule: the number, and the threshold that it passed."""

    word: str
    rule: str
    experts: tuple[int, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(map(str, self.experts[:_MANY])) + (", ..." if len(self.experts) > _MANY else "")
        return f"{self.word} {names}".rstrip()


def verdicts(
    found: Geometry,
    fresh: dict[str, tuple[float, float, float]],
    bias: Tensor | None = None,
    top_k: int | None = None,
    grouped: bool = False,
) -> list[Verdict]:
    """Every rule that a gate breaks, the gravest first; one `healthy` if it breaks none.

    Args:
        fresh: what `fresh` says of the shape.
        bias: the selection bias, of scores in [0, 1].
        top_k: experts that a token gets, if it is known.
        grouped: the choice is among groups first, so that nothing follows from the bias alone.
    """
    told: list[Verdict] = []
    rank, usual = found.centred_stable_rank, fresh["centred_stable_rank"][1]
    if found.spectral_norm == 0:
        return [Verdict("zero", "every entry is 0: all experts score alike")]
    if 1 - found.common < ALIKE:
        told.append(Verdict("collapsed", f"rows equal: {1 - found.common:.2%} of ‖W‖² tells them apart, below {ALIKE:.0%}"))
    elif rank < COLLAPSED and usual >= COLLAPSED + 1:
        told.append(Verdict("collapsed", f"centred stable rank {rank:.2f}, below {COLLAPSED} (fresh: {usual:.1f})"))
    elif rank < 1 + NARROW * (usual - 1):
        least = 1 + NARROW * (usual - 1)
        told.append(Verdict("narrow", f"centred stable rank {rank:.2f}, below {least:.2f} (fresh: {usual:.1f})"))
    quiet = found.row_norms < min(QUIET, fresh["quietest"][0]) * found.row_norms.median()
    if quiet.any():
        told.append(Verdict("dead-looking", f"rows below {QUIET} of the median length", _places(quiet)))
    if pairs := [pair for pair in close_pairs(found, fresh) if not quiet[list(pair)].all()]:
        alike = tuple(sorted({expert for pair in pairs for expert in pair}))
        told.append(Verdict("duplicates", f"rows nearer than {CLOSE} of the median distance", alike))
    loud = found.row_norms > max(LOUD, fresh["loudest"][2]) * found.row_norms.median()
    if loud.any():
        told.append(Verdict("loud", f"rows above {LOUD:g} times the median length", _places(loud)))
    if bias is not None and top_k is not None and not grouped and top_k < len(bias):
        # a score gains at most 1 on another
        closed = bias < bias.topk(top_k).values[-1] - 1
        if closed.any():
            told.append(Verdict("closed", f"selection bias more than 1 below that of {top_k} others", _places(closed)))
    return told or [Verdict("healthy", "no rule is broken")]


def close_pairs(found: Geometry, fresh: dict[str, tuple[float, float, float]]) -> list[tuple[int, int]]:
    """Pairs of experts whose rows are nearly one, the nearest first."""
    apart = found.distances
    first, second = torch.triu_indices(len(apart), len(apart), 1)
    distances = apart[first, second]
    if not len(distances):
        return []
    near = distances < min(CLOSE, fresh["closest"][0]) * distances.median()
    order = distances[near].argsort()
    return list(zip(first[near][order].tolist(), second[near][order].tolist(), strict=True))


def _places(which: Tensor) -> tuple[int, ...]:
    return tuple(which.nonzero().flatten().tolist())
