"""Which experts of each gate are on the path: of the counts of a sample, the largest, or those that make up a share."""

from __future__ import annotations

import torch

from .path import Layer
from .usage import Usage

_TINY = 1e-12


def check_rule(top: int | None, share: float | None, by: str) -> None:
    """Raises:
    ValueError: not one of the two, or one out of range.
    """
    if (top is None) == (share is None):
        raise ValueError(f"give either top (so many experts a layer) or share (of the tokens), got top={top}, share={share}")
    if top is not None and not (isinstance(top, int) and top >= 1):
        raise ValueError(f"top must be a whole number of at least 1, the experts of each layer, got top={top!r}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], the part of the tokens that the experts are to cover, got share={share!r}")
    if by not in ("tokens", "weights"):
        raise ValueError(f'by must be "tokens" or "weights", got by={by!r}')


def select(name: str, usage: Usage, reference: Usage | None, top: int | None, share: float | None, by: str) -> Layer:
    """The experts of one gate, largest score first; none where no token came by.

    The score s_e is the expert's part of the choices, or of the combine weights; with a reference sample, experts are ranked by
    their lift s_e / r_e over it. `top` takes so many; `share` as many as it takes for their scores to reach it.

    NOTE[DIFF]: ESFT (arXiv 2407.01906, equations 5 and 6) means the scores of each sample first and then those of the samples,
    all cut to one length; here every token counts alike. Its gate score is a mean that need not sum to one; here it does.
    """
    scores = usage.share if by == "tokens" else usage.weight
    rank = scores
    if reference is not None and usage.tokens:
        if not reference.tokens:
            raise ValueError(f"no token of the reference sample came by the gate {name!r}, so there is no lift over it")
        base = reference.share if by == "tokens" else reference.weight
        rank = scores / base.clamp_min(_TINY)
    order = rank.argsort(descending=True, stable=True).tolist()
    taken: list[int] = []
    covered = 0.0
    for expert in order if usage.tokens else []:
        enough = len(taken) >= top if top is not None else covered >= (share or 0.0) - _TINY
        if enough or not scores[expert] > 0:
            break
        taken.append(expert)
        covered += float(scores[expert])
    chosen = torch.tensor(taken, dtype=torch.long)
    return Layer(
        name, len(scores), tuple(taken), usage.tokens, float(usage.share[chosen].sum()), float(usage.weight[chosen].sum())
    )
