"""torchtitan: the term arrives once in `Trainer.train_step`, under accumulation, FSDP2, tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..wrap.attach import wrap_moe
from ..wrap.handle import MoEHandle

__all__ = ["attach"]


def attach(trainer: Any, *, at_step: bool = True, **options: Any) -> MoEHandle:
    """`wrap_moe` for a torchtitan `Trainer`, with no change to its loop.

    torchtitan's loss is a sum over tokens, divided by the tokens of the whole step, and its gradients are summed over
    micro-batches and ranks: `loss + handle.loss()` would count the term micro-batches x ranks times.

    Args:
        trainer: a `torchtitan.trainer.Trainer`, made. Its `model_parts` are wrapped, whatever shells they have.
        at_step: add the gradient to the gates' when the trainer's optimizer steps (`MoEHandle.attach`), after clipping.
            Balance losses move the gates' own matrices only, and are averaged over all ranks. False: wrap
            `trainer.loss_fn`, which then adds `handle.loss()` times the part of the step that the micro-batch stands for.
        **options: of `wrap_moe`.

    Returns:
        `MoEHandle`. `remove()` leaves the loss function as it was, too.

    Raises:
        ValueError, TypeError: as `wrap_moe`; or the loss is asked for where the stages of a pipeline have none.

    >>> trainer = config.build()     # doctest: +SKIP
    >>> handle = attach(trainer)     # doctest: +SKIP
    >>> trainer.train()              # doctest: +SKIP
    """
    pipeline = trainer.parallel_dims.pp_enabled
    if pipeline and not at_step:
        raise ValueError("at_step must be True under pipeline parallelism, as earlier stages have no loss, got at_step=False")
    handle = wrap_moe(trainer.model_parts, **{"add_to_loss": False, **options})
    if at_step:
        own = {id(parameter) for gate in handle.gates for parameter in gate.owner.parameters()}
        for optimizer in trainer.optimizers:
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                handle.attach(optimizer, group=_replicas(trainer) if pipeline else None)
        if pipeline:
            schedule = trainer.pp_schedule
            for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
                stage._prepare_forward_infra = _Unseen(stage._prepare_forward_infra, handle)
        return handle
    trainer.loss_fn = _WithTerm(trainer.loss_fn, handle, trainer)
    return handle


def _replicas(trainer: Any) -> Any:
    """The ranks that hold the same stage."""
    import torch.distributed as dist

    mesh = trainer.parallel_dims.get_optional_mesh("loss")
    return dist.new_group([dist.get_rank()], use_local_synchronization=True) if mesh is None else mesh.get_group()


class _Unseen:
    """What torch's pipelines do before the first step: run each stage on memory as it is, to learn the shapes."""

    def __init__(self, plain: Callable[..., Any], handle: MoEHandle) -> None:
        self.plain = plain
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.handle.attached = self.handle.attached, False
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.handle.attached = before


class _WithTerm:
    """torchtitan's loss with the term in it."""

    def __init__(self, plain: Callable[..., Any], handle: MoEHandle, trainer: Any) -> None:
        self.plain = plain
        self.handle = handle
        # under this backend gates are replicated over tensor-parallel ranks, whose gradients are summed, not averaged
        summed = trainer.config.parallelism.spmd_backend == "spmd_types"
        self.ranks = trainer.parallel_dims.tp if summed else 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __call__(self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **others: Any) -> Any:
        loss, metrics = self.plain(pred, labels, global_valid_tokens, **others)
        if not self.handle.attached or self.handle.step.term is None:
            return loss, metrics
        term = self.handle.loss(share=1.0)
        if global_valid_tokens is not None:
            term = term * (labels.ne(-100).sum() / global_valid_tokens)
        return loss + term / self.ranks, metrics
