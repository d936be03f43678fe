"""wrap_moe: router penalties on any existing mixture-of-experts model, by hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..balance.losses import LoadBalanceLoss
from ..gates.select import Selector, select_gates
from ..penalties.spectral_rank import SpectralRankPenalty
from .hooks import AfterModel, AtGate, BeforeModel, Hook
from .metrics import measure
from .recorder import Recorder
from .state import restore, tensors
from .step import Step

__all__ = ["MoEHandle", "wrap_moe"]

Penalty = Callable[[Sequence[Tensor]], Tensor]
Balance = Callable[[Tensor, "Tensor | None"], Tensor]


class MoEHandle(Recorder):
    """What `wrap_moe` attached to a model: its term, its measurements, and the way back.

    Attributes:
        model: the wrapped model.
        gates: the list of `Gate`, in the order of the model.
        penalty, balance: the two callables, or None; others may be put in their place between steps.
        penalty_coef, balance_coef: α and β of equation 7; plain floats that may be changed between steps.

    `print(handle)` is a table of the gates. As a context manager it removes itself at the end.
    """

    # unpickled in a new process, these raise torch's counter of hooks there, so that a later hook does not replace ours
    registrations: list[RemovableHandle]

    @classmethod
    def of(cls, model: nn.Module) -> MoEHandle | None:
        """The handle of a wrapped model, None if it is not wrapped. A copy of a wrapped model, or one loaded from a file, has
        a handle of its own."""
        return next((hook.handle for _, _, hook in _hooks_below(model) if isinstance(hook.handle, cls)), None)

    def loss(self) -> Tensor:
        """The term of the last training forward: `penalty_coef` x penalty + `balance_coef` x the sum of the balance losses.

        For models that return no loss, or under `add_to_loss=False`: add it to your own loss, once a forward.

        Raises:
            RuntimeError: the term is in the model's loss already, was taken already, or there was no training forward.
        """
        term, fate = self.step.term, self.step.fate
        if term is None:
            why = (
                f"the term of the last training forward {fate}"
                if fate
                else "the last forward was not one in training, with gradients"
            )
            raise RuntimeError(f"handle.loss() has no term to give: {why}")
        self.step.term, self.step.fate = None, "was taken by handle.loss() already; call it once a forward"
        return term

    def metrics(self) -> dict[str, dict[str, float]]:
        """Detached floats for each gate, by its name, of its weight as it is now and of the last training forward.

        sigma_max and stable_rank of the weight; penalty: this gate's part; balance: CV², squared coefficient of variation of
        the experts' mean probability; entropy: of that mean, over log K, in [0, 1]; max_share: its largest
        entry; dead: the number of experts below 1 % of an even share; loss: this gate's part of the term, coefficients
        included, with whatever penalty and balance loss are in use. What needs a training forward is NaN before the first
        one, and for a gate that did not run.

        This reads numbers back from the device, so call it at logging steps; under FSDP2 and ZeRO-3 call it on every rank.
        """
        return measure(self)

    def remove(self) -> None:
        """Take every hook off; the model is then what it was. Call it after the backward; safe to call twice."""
        for module, registry, hook in list(_hooks_below(self.model)):
            if hook.handle is self:
                for key in [key for key, value in registry.items() if value is hook]:
                    del registry[key]
                    for flags in (
                        "_forward_hooks_with_kwargs",
                        "_forward_hooks_always_called",
                        "_forward_pre_hooks_with_kwargs",
                    ):
                        getattr(module, flags).pop(key, None)
        self.step = Step()
        self.attached = False

    def __enter__(self) -> MoEHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """What the objective depends on beyond the model: the state of penalty and balance (anchors, iterates, statistics)."""
        return {
            "gates": {gate.name: (gate.num_experts, gate.dim) for gate in self.gates},
            **{name: tensors(part) for name, part in (("penalty", self.penalty), ("balance", self.balance))},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another handle on the same gates.

        Raises:
            ValueError: the state is of other gates.
        """
        here = {gate.name: (gate.num_experts, gate.dim) for gate in self.gates}
        there = {name: tuple(shape) for name, shape in state["gates"].items()}
        if here != there:
            different = [name for name in here | there if here.get(name) != there.get(name)]
            raise ValueError(f"the state is of other gates than this handle's; they differ in {', '.join(different)}")
        for name, part in (("penalty", self.penalty), ("balance", self.balance)):
            if isinstance(part, nn.Module):
                restore(part, state[name], next(self.model.parameters()).device)

    def __repr__(self) -> str:
        head = ("gate", "class", "experts x dim", "scoring", "read from")
        rows = [head] + [(g.name, type(g.module).__name__, f"{g.num_experts} x {g.dim}", g.scoring, g.how) for g in self.gates]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts = [
            f"{c} x {p!r}" for p, c in ((self.penalty, self.penalty_coef), (self.balance, self.balance_coef)) if p is not None
        ]
        return "\n".join([f"{type(self.model).__name__}: {' + '.join(parts) or 'nothing added'}", *lines])


def wrap_moe(
    model: nn.Module,
    *,
    penalty: Penalty | Literal["default"] | None = "default",
    balance: Balance | Literal["default"] | None = "default",
    penalty_coef: float = 1e-2,
    balance_coef: float = 1e-2,
    gates: Selector | None = None,
    exclude: Selector | None = None,
    add_to_loss: bool = True,
) -> MoEHandle:
    """Attach a weight penalty and a balance loss to the gates of a model, with no change to the model or its training loop.

        loss = task + penalty_coef · Σ penalty(W_l) + balance_coef · Σ balance(p_l)

    In training, where the model's output carries a loss (a transformers `ModelOutput`, a mapping with "loss", an object with
    a `loss`), a forward hook adds the term to it: loss scaling, gradient accumulation, mixed precision,
    activation checkpointing and trainers work as they do without it. Otherwise add `handle.loss()` to your own
    loss after the forward. Outside training nothing is computed and nothing kept. No parameter, buffer or submodule is
    added.

    Args:
        model: any module with router gates. Wrap the outermost module that is called, after PEFT and before `torch.compile`;
            before or after DDP, `fully_shard` and `deepspeed.initialize`, inside of whose shells the model itself is wrapped.
        penalty: reads weights: a callable (list of (experts, dim) tensors) -> scalar. "default" is a new
            `SpectralRankPenalty("initial", relative=True)`; None is none.
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

    Returns:
        `MoEHandle`: the term, measurements, state, and `remove()`; also a context manager.

    Raises:
        ValueError: no gate found or matched (the message lists near misses), a coefficient below 0, a model that is wrapped
            already, or a balance loss of logits on a gate that gives probabilities only.
        TypeError: a selector, penalty or balance of the wrong kind.

    Warns:
        UserWarning, once each, with names: gates that are frozen, quantised or did not run in the first training forward; a
            model compiled before; the model's own balance loss also on; a term that nobody used.

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
        if not 0 <= coef < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {name}={coef}")
    if penalty == "default":
        penalty = SpectralRankPenalty("initial", relative=True)
    if balance == "default":
        balance = LoadBalanceLoss()
    for name, part in (("penalty", penalty), ("balance", balance)):
        if part is not None and not callable(part):
            raise TypeError(f'{name} must be a callable, "default" or None, got {part!r}')
    root, compiled = _inside(model)
    if MoEHandle.of(root) is not None:
        raise ValueError(f"{type(root).__name__} is wrapped already; call MoEHandle.of(model).remove() first")
    chosen = select_gates(root, gates, exclude)
    handle = MoEHandle(root, chosen, penalty, balance, penalty_coef, balance_coef, add_to_loss)
    if compiled:
        handle.advice.compiled([type(root).__name__])
    handle.advice.at_wrapping(root, balance)
    handle.registrations = [
        root.register_forward_pre_hook(BeforeModel(handle), with_kwargs=True),
        # first here too: the backward of the whole loss, the term included, is to pass the engines' hooks
        root.register_forward_hook(AfterModel(handle), with_kwargs=True, always_call=True, prepend=True),
        # first of the module's hooks: sharding engines free the weight in theirs
        *(
            gate.module.register_forward_hook(AtGate(handle, index), with_kwargs=True, prepend=True)
            for index, gate in enumerate(chosen)
        ),
    ]
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


def _hooks_below(model: nn.Module) -> list[tuple[nn.Module, dict[int, Any], Hook]]:
    registries: list[tuple[nn.Module, dict[int, Any]]] = [
        (module, registry) for module in model.modules() for registry in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return [(module, registry, hook) for module, registry in registries for hook in registry.values() if isinstance(hook, Hook)]
