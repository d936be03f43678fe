"""How a term gets from the gates of a model into its loss, and back through activation checkpoints."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


def loss_of(output: Any) -> Tensor | None:
    """The loss that a model's output carries: a mapping's "loss", or a `loss` attribute."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    # added to a loss for each sample, the term would count once a sample
    return loss if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 else None


def with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
    elif hasattr(output, "_replace"):  # a named tuple
        return output._replace(loss=loss)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, loss=loss)
    else:
        output.loss = loss
    return output


def argument_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def share_of_step(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | float:
    """The part of an optimizer step that a micro-batch stands for, where the caller says so; 1 where it does not.

    transformers' Trainer passes `num_items_in_batch`, the number of target tokens of the whole step: the model divides a
    sum over the micro-batch by it, and Trainer does not divide the loss by the number of micro-batches. A term added in
    full to each would count once a micro-batch.
    """
    total = arguments.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if isinstance(shifted, Tensor):
        labels = shifted
    elif isinstance(labels, Tensor) and _shifts_labels(model):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / total if isinstance(labels, Tensor) else 1.0


def _shifts_labels(model: Any) -> bool:
    """Whether the model predicts the next token: then the first label of a row is no target."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(base, "loss_type", None) or type(base).__name__
    return ("ForCausalLM" in kind or "ForConditionalGeneration" in kind) and not getattr(
        getattr(base, "config", None), "is_encoder_decoder", False
    )


def token_mask(arguments: Mapping[str, Any], gate: str, probs: Tensor, layout: torch.Size, two_sided: bool) -> Tensor | None:
    """The batch's attention mask, one entry for each of the gate's tokens; None where there is none that fits."""
    decoding = two_sided and "decoder" in gate.split(".")
    mask = arguments.get("decoder_attention_mask" if decoding else "attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.numel() * probs.shape[-1] != probs.numel():
        return None
    if layout[:2] == mask.shape[::-1] and mask.shape[0] != mask.shape[1]:
        mask = mask.mT  # (tokens, batch) layout
    return mask.to(probs.device).reshape(probs.shape[:-1]) != 0
