"""Megatron-Core: the term arrives once under data, tensor, sequence, context, expert and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from ..wrap.at_step import AtStep
from ..wrap.attach import wrap_moe
from ..wrap.delivery import argument_names, by_name
from ..wrap.handle import MoEHandle

__all__ = ["attach"]


def attach(model: nn.Module | Sequence[nn.Module], optimizer: Any = None, **options: Any) -> MoEHandle:
    """`wrap_moe` for Megatron-Core, with no change to `loss_func` or the training loop.

    Without an optimizer the term rides on the output of each stage through Megatron's own `MoEAuxLossAutoScaler`, so each stage
    delivers the term of its own gates. Megatron sums the router's gradient over context-parallel ranks, and over
    tensor-parallel ranks under sequence parallelism, so the term is divided by their number. Under `calculate_per_token_loss`
    it is multiplied by the tokens that the loss counts: those of `loss_mask`, of `labels` (not -100) or outside of
    `padding_mask`, the first that the model is called with. Pass the model its `loss_mask` there if `loss_func` has one.

    With Megatron's optimizer the gradient is added to the gates' `main_grad` when `optimizer.step()` begins, after all
    reductions and before clipping, as `MoEHandle.attach` does: nothing that the schedule scales by matters then. A balance
    loss moves the gate's own matrix only.

    Args:
        model: what `get_model` returns, a list of chunks in the shells of DDP and Float16Module; or the bare model, as
            `model_provider` returns it. A stage may have no gate.
        optimizer: what `get_megatron_optimizer` returns, the distributed optimizer included, or None.
        **options: of `wrap_moe`.

    Returns:
        `MoEHandle`. Call `remove()` to take all of it off.

    Raises:
        ValueError, TypeError: as `wrap_moe`.

    >>> handle = attach(model)                                            # doctest: +SKIP
    >>> handle = attach(model, optimizer, penalty="hold", balance=None)   # doctest: +SKIP
    """
    chunks = [_inside(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    handle = wrap_moe(chunks, **{"add_to_loss": False, **options})
    if optimizer is not None:
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        stepper: Any = _Stepper(handle, optimizer)
        handle.at_step = AtStep(handle, stepper, False, 1, True, group)
        return handle
    # after the hook of wrap_moe, which makes the term
    handle.registrations += [chunk.register_forward_hook(_Ride(handle, chunk), with_kwargs=True) for chunk in chunks]
    return handle


def _inside(chunk: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


class _Ride:
    """Puts the term of one chunk's forward on its output."""

    def __init__(self, handle: MoEHandle, chunk: Any) -> None:
        self.handle = handle
        self.config = chunk.config
        self.names = argument_names(chunk)

    def __call__(self, chunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.handle.at_step is not None or self.handle.step.term is None or not self.handle.attached:
            return None
        term = self.handle.loss(share=1.0)
        if not term.requires_grad or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        ranks = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        if self.config.calculate_per_token_loss:
            term = term * _counted(by_name(self.names, args, kwargs), output) / ranks
        else:
            term = term / (ranks * parallel_state.get_context_parallel_world_size())
        carried = MoEAuxLossAutoScaler.apply(output, term)
        # the schedule frees what it has sent on, and does not take views
        return carried if carried._base is None else carried.clone()


def _counted(arguments: dict[str, Any], output: Tensor) -> Tensor | int:
    """The number of tokens that this rank's loss is a sum over."""
    mask, labels, padding = (arguments.get(name) for name in ("loss_mask", "labels", "padding_mask"))
    if isinstance(mask, Tensor):
        return mask.sum()
    if isinstance(labels, Tensor):
        return labels.ne(-100).sum()
    if isinstance(padding, Tensor):
        return padding.logical_not().sum()
    tokens = next((t for t in (arguments.get("input_ids"), arguments.get("position_ids")) if isinstance(t, Tensor)), output)
    return tokens.shape[0] * tokens.shape[1]


class _Stepper:
    """Megatron's optimizer as delivery at the step sees one: gradients are in `main_grad`, times the loss scale."""

    def __init__(self, handle: MoEHandle, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.gates = [parameter for gate in handle.gates for parameter in gate.owner.parameters(recurse=False)]
        self.before: list[Callable[..., Any]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [parameter for parameter in self.gates if parameter.requires_grad]}]

    @property
    def grad_scale(self) -> Tensor | None:
        scaler = getattr(self.optimizer, "grad_scaler", None)
        chained = getattr(self.optimizer, "chained_optimizers", None) or []
        scaled = scaler is not None or any(getattr(one, "grad_scaler", None) is not None for one in chained)
        return self.optimizer.get_loss_scale() if scaled else None

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> _Restored:
        plain = self.optimizer.prepare_grads

        def prepare_grads(*args: Any, **kwargs: Any) -> Any:
            self._deliver(hook)
            return plain(*args, **kwargs)

        self.optimizer.prepare_grads = prepare_grads
        return _Restored(self.optimizer, prepare_grads)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> _Restored:
        return _Restored(self.optimizer, hook)  # for the decoupled penalty only: never called

    def _deliver(self, hook: Callable[..., Any]) -> None:
        kept = [parameter.grad for parameter in self.gates]
        for parameter in self.gates:
            parameter.grad = None
        hook(self, (self,), {})
        for parameter, before in zip(self.gates, kept, strict=True):
            made: Any = parameter.grad
            parameter.grad = before
            if made is not None:
                with torch.no_grad():
                    main: Tensor = getattr(parameter, "main_grad", None)  # type: ignore[assignment]
                    if main is None:
                        parameter.grad = made if before is None else before.add_(made)
                    else:
                        main.add_(made)


class _Restored:
    """Takes the delivery out of an optimizer again."""

    def __init__(self, optimizer: Any, put: Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self.put = put

    def remove(self) -> None:
        if vars(self.optimizer).get("prepare_grads") is self.put:
            del self.optimizer.prepare_grads
