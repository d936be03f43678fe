"""`wrap_moe`: router penalties on any existing mixture-of-experts model, by hooks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn

from ..balance.losses import LoadBalanceLoss
from ..gates.select import Selector, select_gates
from ..penalties.presets import Preset, preset
from .handle import Balance, MoEHandle, Penalty
from .hooks import AfterModel, BeforeModel
from .weights import trainable


def wrap_moe(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Any = None,
    *,
    penalty: Penalty | Preset | Literal["default"] | None = "spread",
    balance: Balance | Literal["default"] | None = "default",
    penalty_coef: float = 1e-2,
    balance_coef: float = 1e-2,
    gates: Selector | None = None,
    exclude: Selector | None = None,
    add_to_loss: bool = True,
    example: Any = None,
) -> MoEHandle:
    """Attach a weight penalty and a balance loss to the gates of a model, with no change to the model or its training loop.

        loss = task + penalty_coef · Σ penalty(W_l) + balance_coef · Σ balance(p_l)

    In training, where the model's output carries a loss (a transformers `ModelOutput`, a mapping with "loss", an object with
    a `loss`), a forward hook adds the term to it: loss scaling, gradient accumulation, mixed precision,
    activation checkpointing and trainers work as they do without it. Otherwise add `handle.loss()` to your own
    loss after the forward. Outside training nothing is computed and nothing kept. No parameter, buffer or submodule is
    added.

    Args:
        optimizer: deliver the term at its steps instead of in the loss: `MoEHandle.attach`.
        model: any module with router gates, or a list of the parts of one, as pipelines have it: each part's forward then
            has the term of its own gates. Wrap the outermost module that is called, after PEFT and before `torch.compile`;
            before or after DDP, `fully_shard` and `deepspeed.initialize`, inside of whose shells the model itself is wrapped.
        penalty: reads weights; in one word what it is for, each a new `SpectralRankPenalty`, or a callable (list of (experts,
            dim) tensors) -> scalar of your own; None is none.
            "spread", for training from scratch: ("initial", relative=True). Up to the largest stable rank, at the initial norm.
            "hold", for fine-tuning: ("initial", "initial", relative=True, one_sided=True). Neither a lower stable rank nor a
            higher norm than at the start, where the penalty is zero.
            "paper": (). Equations 3 + 5 as printed: norm 1, the largest rank, in units of the two; it needs a small
            `penalty_coef` where experts are many.
        balance: reads probabilities: a callable (probs (tokens, experts), mask or None) -> scalar, called once for each call
            of a gate, never on pooled layers. "default" is a new `LoadBalanceLoss()`; None is none. Where the model is called
            with an `attention_mask`, padding is masked out. One with the attribute `reads = "logits"`, as `RouterZLoss`,
            gets the gate's logits (tokens, experts) instead.
        penalty_coef: α of equation 7, at least 0.
        balance_coef: β of equation 7, at least 0.
        gates: None finds them all (`find_gates`); or a name or its suffix, a regular expression that matches the full
            name, a module class, a predicate (name, module) -> bool, `Gate` objects, or a list of these.
        exclude: in the same terms, gates to leave out.
        add_to_loss: False leaves the model's loss alone; add `handle.loss()`.
        example: a batch (a mapping of keywords, a tuple or one argument) to run the model on once, without gradients: its gates
            are then found by what it computes, under any name. Without one the first training forward is watched instead, and
            corrects how the gates are read.

    Returns:
        `MoEHandle`: the term, measurements, state, and `remove()`; also a context manager.

    Raises:
        ValueError: no gate found or matched (the message lists near misses), an unknown word for the penalty, a coefficient
            below 0, a model that is wrapped already, or a balance loss of logits on a gate that gives probabilities only.
        TypeError: a selector, penalty or balance of the wrong kind.

    Warns:
        UserWarning, once each, with names: gates that look trained already, under "spread"; gates that are frozen, buffers,
            quantised or did not run in the first training forward; gates
            read otherwise than it computes, or missed by names; a model compiled before; the model's own balance loss also
            on; a term that nobody used.

    Source:
        equation 7 of arXiv:2601.03889.

    >>> import torch
    >>> class MoE(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(16, 4)
    ...         self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    ...     def forward(self, x):
    ...         probs = self.router(x).softmax(-1)
    ...         return sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts))
    >>> model = MoE()
    >>> handle = wrap_moe(model)
    >>> (model(torch.randn(8, 16)).square().mean() + handle.loss()).backward()
    >>> print(handle)  # doctest: +NORMALIZE_WHITESPACE
    MoE: 0.01 x SpectralRankPenalty(...) + 0.01 x LoadBalanceLoss(unbiased=False)
    gate    class   experts x dim  scoring  read from
    router  Linear  4 x 16         softmax  output: logits
    """
    for name, coef in (("penalty_coef", penalty_coef), ("balance_coef", balance_coef)):
        if not isinstance(coef, Real):
            raise TypeError(f"{name} must be a number, got {name}={coef!r}")
        if not 0 <= coef < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {name}={coef}")
    if penalty == "default":
        penalty = "spread"
    spread = penalty == "spread"
    if isinstance(penalty, str):
        penalty = preset(penalty)
    if balance == "default":
        balance = LoadBalanceLoss()
    for name, part, words in (("penalty", penalty, '"spread", "hold", "paper"'), ("balance", balance, '"default"')):
        if isinstance(part, type):
            raise TypeError(f"{name} must be an instance, got the class {part.__name__}; call it: {name}={part.__name__}()")
        if part is not None and not callable(part):
            raise TypeError(f"{name} must be a callable, {words} or None, got {part!r}")
    shells = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Iterable) else []
    if not shells or not all(isinstance(shell, nn.Module) for shell in shells):
        raise TypeError(f"model must be a module, or a list of the modules that are its parts, got {model!r:.200}")
    parts, compiled = zip(*map(_inside, shells), strict=True)
    for part in parts:
        if MoEHandle.of(part) is not None:
            raise ValueError(f"{type(part).__name__} is wrapped already; call MoEHandle.of(model).remove() first")
    root = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    chosen = select_gates(root, gates, exclude, example)
    _claim(penalty, parts[0])
    _forget_compiled(root)
    handle = MoEHandle(list(parts), chosen, penalty, balance, penalty_coef, balance_coef, add_to_loss)
    if any(compiled):
        handle.advice.compiled([type(part).__name__ for part, ran in zip(parts, compiled, strict=True) if ran])
    for part in parts:
        handle.advice.at_wrapping(part, balance)
    if spread:
        handle.advice.trained_gates([gate for gate in handle.gates if trainable(gate)])
    handle._selectors = gates, exclude
    handle.by_names = gates is None and exclude is None and example is None
    handle.registrations = []
    for number, part in enumerate(parts):
        handle.registrations += [
            part.register_forward_pre_hook(BeforeModel(handle, part=number), with_kwargs=True),
            # first here too: the backward of the whole loss, the term included, is to pass the engines' hooks
            part.register_forward_hook(AfterModel(handle, part=number), with_kwargs=True, always_call=True, prepend=True),
        ]
    handle.registrations += [handle._hook(tap) for tap in handle.taps]
    if optimizer is not None:
        handle.attach(optimizer)
    return handle


def _inside(model: nn.Module) -> tuple[nn.Module, bool]:
    """What is in the shells of DDP, DeepSpeed and torch.compile, whose calls have no argument names, and if it is compiled."""
    compiled = False
    while True:
        if hasattr(model, "_orig_mod"):
            model, compiled = model.get_submodule("_orig_mod"), True
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.get_submodule("module")
        else:
            return model, compiled


def _claim(penalty: object, model: nn.Module) -> None:
    """A penalty that remembers its matrices belongs to one model."""
    if not getattr(penalty, "remembers", False):
        return
    owner = vars(penalty).setdefault("_owner", id(model))
    if owner != id(model):
        raise ValueError(
            f"the {type(penalty).__name__} belongs to another model, whose matrices it remembers by position; give each model "
            "one of its own"
        )


def _forget_compiled(model: nn.Module) -> None:
    """Code that was compiled for another model of these classes has no hooks in it, and would be run here all the same."""
    if "torch._dynamo" in sys.modules:
        for code in {type(module).forward.__code__ for module in model.modules() if hasattr(type(module).forward, "__code__")}:
            torch._dynamo.eval_frame.reset_code(code)  # type: ignore[attr-defined]
