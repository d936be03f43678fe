"""Whether a backward has reached a term: counted as it runs, in compiled code too."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._sharding import whole

if TYPE_CHECKING:
    from .recorder import Recorder

_numbers = itertools.count()
_recorders: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()


def number_of(recorder: Recorder) -> int:
    """What stands for the recorder in a graph, where no object can."""
    number = next(_numbers)
    _recorders[number] = recorder
    return number


def followed(term: Tensor, recorder: Recorder) -> Tensor:
    """The term itself; its forward and the backward that reaches it are noted in the recorder's step."""
    if not term.requires_grad:
        return term
    if torch.compiler.is_compiling():
        return torch.ops.spectral_router.follow(term, recorder.number)
    _left(recorder)
    return _Followed.apply(term, recorder)


class _Followed(torch.autograd.Function):
    """Identity. A gradient that comes as a DTensor, from a loss that is one, goes on as a plain tensor, as the term is."""

    @staticmethod
    def forward(term: Tensor, recorder: Recorder) -> Tensor:
        return term.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Recorder], output: Tensor) -> None:
        ctx.recorder = weakref.ref(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _arrived(ctx.recorder())
        return whole(grad), None


def _left(recorder: Recorder | None) -> None:
    if recorder is not None:
        recorder.step.forwards += 1


def _arrived(recorder: Recorder | None) -> None:
    if recorder is not None:
        recorder.step.without_backward = 0
        recorder.step.arrived = True


def _follow(term: Tensor, number: int) -> Tensor:
    _left(_recorders.get(number))
    return term.clone()


def _follow_back(grad: Tensor, number: int) -> Tensor:
    _arrived(_recorders.get(number))
    return grad.clone()


def _remember_number(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.number = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.spectral_router.follow_back(grad, ctx.number), None


if not hasattr(torch.ops.spectral_router, "follow"):  # a reload finds it
    for name, run in (("follow", _follow), ("follow_back", _follow_back)):
        torch.library.define(f"spectral_router::{name}", "(Tensor x, int number) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"spectral_router::{name}", "default", run)
        torch.library.register_fake(f"spectral_router::{name}", lambda x, number: torch.empty_like(x))
    torch.library.register_autograd("spectral_router::follow", _backward, setup_context=_remember_number)
