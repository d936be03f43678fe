"""How a term gets from the gates of a model into its loss, and what part of an optimizer's step it is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
    full to each would count once a micro-batch. OLMo-core's train modules pass `loss_div_factor` likewise, with labels that are
    shifted already.
    """
    total = arguments.get("num_items_in_batch")
    if total is None:
        factor, labels = arguments.get("loss_div_factor"), arguments.get("labels")
        if factor is None or not isinstance(labels, Tensor):
            return 1.0
        return labels.ne(arguments.get("ignore_index", -100)).sum() / factor
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if isinstance(shifted, Tensor):
        labels = shifted
    elif isinstance(labels, Tensor) and _shifts_labels(model):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / total if isinstance(labels, Tensor) else 1.0


def share_above() -> float:
    """The fraction of a step that a loss stands for which is built right now inside of transformers' Trainer; 1 elsewhere.

    Trainer divides the loss by the number of micro-batches, or leaves that to whoever builds it; the same rule is asked here.
    """
    frame = None if torch.compiler.is_compiling() else inspect.currentframe()
    while frame is not None:
        trainer: Any = frame.f_locals.get("self")
        steps = getattr(trainer, "current_gradient_accumulation_steps", None)
        if isinstance(steps, int) and "num_items_in_batch" in frame.f_locals:
            scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
            if scaled is None:
                counted = frame.f_locals["num_items_in_batch"] is not None
                scaled = (trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None
            return 1 / steps if scaled else 1.0
        frame = frame.f_back
    return 1.0


def _shifts_labels(model: Any) -> bool:
    """Whether the model predicts the next token: then the first label of a row is no target."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(base, "loss_type", None) or type(base).__name__
    return ("ForCausalLM" in kind or "ForConditionalGeneration" in kind) and not getattr(
        getattr(base, "config", None), "is_encoder_decoder", False
    )


def padding_position(module: nn.Module) -> int | None:
    """Where Megatron-Core's routers get their `padding_mask`, which is this rank's part of it already."""
    names = argument_names(module)
    return names.index("padding_mask") if "padding_mask" in names else None


def own_mask(position: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a gate was told of its tokens: True where one is no padding, in any shape."""
    if position is None:
        return None
    padding = args[position] if len(args) > position else kwargs.get("padding_mask")
    return padding.logical_not() if isinstance(padding, Tensor) else None


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module was called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def layout_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], without: Tensor) -> torch.Size:
    """The shape of that tensor, as `token_mask` asks for it; of `without` where there is none."""
    given = first_tensor(args, kwargs)
    return (without if given is None else given).shape


def token_mask(
    arguments: Mapping[str, Any], decoding: bool, probs: Tensor, layout: torch.Size, own: Tensor | None = None
) -> Tensor | None:
    """The gate's own mask or the batch's attention mask, one entry for each of its tokens; None where none fits."""
    if own is not None and own.numel() * probs.shape[-1] == probs.numel():
        return own.to(probs.device).reshape(probs.shape[:-1])
    mask = arguments.get("decoder_attention_mask" if decoding else "attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.numel() * probs.shape[-1] != probs.numel():
        return None
    if layout[:2] == mask.shape[::-1] and mask.shape[0] != mask.shape[1]:
        mask = mask.mT  # (tokens, batch) layout
    return mask.to(probs.device).reshape(probs.shape[:-1]) != 0
