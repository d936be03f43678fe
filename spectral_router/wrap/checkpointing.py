"""Gates in layers under reentrant checkpointing, whose first pass has no graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .advice import Advice
from .step import StandIns, Tap

# Stand-ins of forwards whose backward never came are let go after so many further ones of the same gate.
_OUTSTANDING = 64


class _PassOn(torch.autograd.Function):
    """Identity on a gate's outputs; backward also gives `live` tensors the gradients that their stand-ins have received."""

    @staticmethod
    def forward(ctx: Any, stand_ins: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.stand_ins = stand_ins
        ctx.set_materialize_grads(False)
        # no views: those of a function may not be changed in place, which a gate's caller is free to do
        return tuple(tensor.clone() for tensor in tensors[len(stand_ins) :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *(stand_in.grad for stand_in in ctx.stand_ins), *grads)


def pass_on(stand_ins: list[Tensor], live: list[Tensor], output: Any, name: str) -> Any:
    """The output of a recomputed gate, tied to the gradients that reached the term in the loss.

    Reentrant checkpointing runs a layer without a graph first. The term of that pass is computed from stand-ins, leaves
    with the values that the gate gave. Their gradients are known, scaled with the loss however it was scaled,
    before the layer is run again with a graph; there they go on to the tensors that the stand-ins stood for.
    """
    leaves, structure = pytree.tree_flatten(output)
    carried = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not carried:
        raise RuntimeError(
            f"gate {name!r} hands out nothing differentiable, so under reentrant checkpointing no gradient of its term can "
            "reach it; checkpoint with use_reentrant=False, or leave the gate out with wrap_moe(exclude=...)"
        )
    passed = _PassOn.apply(stand_ins, *live, *(leaves[i] for i in carried))
    for i, tensor in zip(carried, passed, strict=True):
        leaves[i] = tensor
    return pytree.tree_unflatten(leaves, structure)


def stand_in(tap: Tap, scores: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For the first pass: leaves stand in for what the second pass will compute."""
    # for the weight too: DDP takes one gradient a parameter and backward, which is the second pass's
    scores, weight = scores.detach().requires_grad_(), weight.detach().requires_grad_()
    tap.deferred = [*tap.deferred[1 - _OUTSTANDING :], StandIns(scores, weight, tap.taken)]
    return scores, weight


def run_again(tap: Tap, scores: Tensor, weight: Tensor, output: Any, model: nn.Module, advice: Advice) -> Any:
    """For the second pass: the gate's output, tied to what has come in for the first; None if it had a graph."""
    waiting, gate = tap.deferred, tap.gate
    if not torch.compiler.is_compiling() and not waiting:
        # with no backward running this is a forward; else a second pass, whose first nobody has seen
        if torch._C._current_graph_task_id() == -1 or not tap.seen:
            advice.outside(gate.name, type(model).__name__)
        return None
    if not waiting or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1):
        return None
    # several forwards may wait for their backward: this one's stand-ins have the same values and, by now, gradients
    here = [i for i, before in enumerate(waiting) if len(waiting) == 1 or torch.equal(before.scores, scores)]
    reached = [i for i in here if waiting[i].scores.grad is not None]
    stand_ins = waiting.pop((reached or here or [-1])[-1])
    tap.taken += 1
    # of forwards that have no backward, as of a validation with gradients on
    tap.deferred = [old for old in waiting if tap.taken - old.born < _OUTSTANDING]
    return pass_on([stand_ins.scores, stand_ins.weight], [scores, weight], output, gate.name)
