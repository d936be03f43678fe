"""The penalty's gradient at the optimizer's step: of weights alone, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._precision import full_precision
from ..penalties.step_form import add_gradients_, fits
from .weights import full_weight, plain_matrix

if TYPE_CHECKING:
    from .recorder import Recorder


def add_penalty_(recorder: Recorder, owned: set[int], times: float) -> bool:
    """Add it to the gradients without a graph, where all gates are plain parameters; False: it is to be had otherwise.

    Args:
        owned: ids of the parameters that the optimizer steps.
        times: how many steps it is for.
    """
    gates = [recorder.gates[group[0]] for group in recorder.ties]
    matrices = [matrix for matrix in map(plain_matrix, gates) if matrix is not None]
    if not gates or len(matrices) < len(gates) or not fits(recorder.penalty, matrices):
        return False
    runs = (recorder.runs(group[0]) for group in recorder.ties)
    learns = [run and m.requires_grad and id(m) in owned for m, run in zip(matrices, runs, strict=True)]
    if any(m.grad is not None and m.grad.dtype != m.dtype for m in matrices):
        return False
    for matrix, learning in zip(matrices, learns, strict=True):
        if learning and matrix.grad is None:
            matrix.grad = torch.zeros_like(matrix)
    gradients = [m.grad if learning else None for m, learning in zip(matrices, learns, strict=True)]
    sides = [gate.transposed for gate in gates]
    return add_gradients_(
        recorder.penalty,  # type: ignore[arg-type]
        [m.detach().mT if side else m.detach() for m, side in zip(matrices, sides, strict=True)],
        [g if g is None or not side else g.mT for g, side in zip(gradients, sides, strict=True)],
        recorder.penalty_coef * times,
    )


def penalty_gradients(recorder: Recorder, times: float) -> dict[int, Tensor]:
    """By the number of the first gate of each matrix: coefficient x gradient of the penalty, (K, D)."""
    learning = recorder.learning()
    if recorder.penalty is None or not any(learning):
        return {}
    leaves = {}
    with torch.enable_grad():
        for group in recorder.ties:
            leaves[group[0]] = full_weight(recorder.gates[group[0]]).detach().requires_grad_()
        with full_precision(next(iter(leaves.values())).device):
            term = recorder.penalty_of(leaves)
        firsts = [group[0] for group, learns in zip(recorder.ties, learning, strict=True) if learns]
        if term is None or not term.requires_grad:
            return {}
        slopes = torch.autograd.grad(term * (recorder.penalty_coef * times), [leaves[first] for first in firsts])
    return dict(zip(firsts, slopes, strict=True))
