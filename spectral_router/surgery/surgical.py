"""`surgical`: an update of the experts on one path, and of nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .._rules import flat, meets
from ..gates.find import find_gates
from ..gates.gate import Gate
from ..wrap.attach import _inside
from ..wrap.handle import MoEHandle
from .delta import entry
from .experts import experts_of, shared_experts_of
from .guard import Guard
from .part import Part, Region
from .path import ExpertPath, Layer
from .select import check_rule, select
from .usage import reshard, usage_of

_TAKE = "also takes"


def surgical(
    model: MoEHandle | nn.Module,
    batch: Any = None,
    *,
    top: int | None = None,
    share: float | None = None,
    by: Literal["tokens", "weights"] = "tokens",
    reference: Any = None,
    path: ExpertPath | Mapping[str, Iterable[int]] | str | Path | None = None,
    also: Any = None,
    shared: bool = False,
    freeze: bool = True,
) -> Surgery:
    """A context in which only the experts that a batch takes can change.

    Each layer's experts are ranked by their part of the batch, s_e, and the first of them are the path: `top` of them, or as
    many as make up `share`. Inside the context, trunk, routers and the other experts are frozen; the slices of
    stacked parameters that are off the path are kept through each step of any torch optimizer to the bit, weight decay and
    momentum from before included, and so is their part of the optimizer's state. Buffers are put back at the end.

    Args:
        model: a `MoEHandle`, or a model whose gates `find_gates` finds.
        batch: what the model is called with: a mapping of keywords, a tensor, or a tuple of arguments; or several of these,
            as a list or a data loader. It is run in evaluation and changes nothing. Padding, by its `attention_mask`, is left
            out.
        top: so many experts in each layer, at least 1; 1 is the paper's winning path. Either this or `share`.
        share: as many experts in each layer as take this part of the tokens, in (0, 1].
        by: "tokens": s_e is the expert's part of the choices (ESFT-token; where every expert takes part in every token, of
            the largest weights). "weights": its part of the combine weights (ESFT-gate).
        reference: another sample, in the form of `batch`: experts are ranked by s_e over their part of this one, their lift:
            those that the batch takes more than usual.
        path: one that is known, in place of a batch: an `ExpertPath`, the file of one, or numbers of experts by the names of
            gates.
        also: other modules or parameters that may change: a name or its suffix, a regular expression, a class, a predicate, or
            a list of these.
        shared: shared experts may change too.
        freeze: False leaves `requires_grad` of everything as it is, as DDP needs it that was made before, and drops gradients
            off the path at the optimizer's step.

    Returns:
        a context manager, whose value is the `ExpertPath`: print it, save it, save what changed.

    Raises:
        ValueError: not one of `top` and `share`, or one out of range; no gate; a path of other gates; experts that
            cannot be told apart (see `experts_of`); `freeze=False` under a handle that delivers at the optimizer's step.
        RuntimeError: parameters that no torch optimizer steps (DeepSpeed ZeRO-3).

    Warns:
        UserWarning: optimizers have stepped other parameters of the model and none on the path.

    Source:
        section 3.3 of arXiv:2601.03889 (the winning path); ESFT, arXiv:2407.01906 (shares).

    >>> import torch
    >>> class MoE(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(16, 4)
    ...         self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    ...     def forward(self, x):
    ...         probs = self.router(x).softmax(-1)
    ...         return sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts))
    >>> model, x = MoE(), torch.randn(1, 16)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> before = {name: p.clone() for name, p in model.named_parameters()}
    >>> with surgical(model, x, top=1, by="weights") as path:
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    >>> {name.rpartition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {
    ...     f"experts.{path.layers[0].experts[0]}"}
    True
    """
    root = model.model if isinstance(model, MoEHandle) else _inside(model)[0]
    handle = model if isinstance(model, MoEHandle) else MoEHandle.of(root)
    gates = find_gates(root) if handle is None else handle.gates
    if not gates:
        raise ValueError(f"no router gate found in {type(root).__name__}; wrap it with gates=... and pass the handle")
    if any(hasattr(parameter, "ds_id") for parameter in root.parameters()):
        raise RuntimeError("surgical does not work under DeepSpeed ZeRO-3, whose optimizer steps flat copies of the parameters")
    if handle is not None and handle.at_step is not None and not freeze:
        raise ValueError(
            "freeze=False does not go with a handle that delivers its term at the optimizer's step, after what is off the path "
            "has been left out: call handle.remove() for the update, or wrap without optimizer="
        )
    if path is None:
        if batch is None:
            raise ValueError("give a batch, whose experts are to change, or a path that is known")
        check_rule(top, share, by)
        found = usage_of(root, gates, batch)
        usual = [None] * len(gates) if reference is None else usage_of(root, gates, reference)
        layers = [select(g.name, mine, other, top, share, by) for g, mine, other in zip(gates, found, usual, strict=True)]
        rule = {"top": top, "share": share, "by": by, "lift": reference is not None}
        made = ExpertPath(layers, rule)
    else:
        made = _known(path, gates)
    return Surgery(root, gates, made, also, shared, freeze, handle)


def _known(path: ExpertPath | Mapping[str, Iterable[int]] | str | Path, gates: Sequence[Gate]) -> ExpertPath:
    here = {gate.name: gate.num_experts for gate in gates}
    if isinstance(path, Mapping):
        nothing = math.nan  # nothing was counted
        path = ExpertPath(
            [Layer(name, here.get(name, 0), tuple(experts), 0, nothing, nothing) for name, experts in path.items()]
        )
    made = path if isinstance(path, ExpertPath) else ExpertPath.load(path)
    if strange := [layer.gate for layer in made.layers if layer.gate not in here]:
        raise ValueError(f"the path is of other gates than the model's: {', '.join(strange[:3])}; there are {', '.join(here)}")
    return made


class Surgery:
    """What `surgical` returns: the path, and the context in which only it can change."""

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        path: ExpertPath,
        also: Any,
        shared: bool,
        freeze: bool,
        handle: MoEHandle | None,
    ) -> None:
        self.model, self.path, self.freeze, self.handle = model, path, freeze, handle
        reshard(model)
        by_name = {gate.name: gate for gate in gates}
        self.parts: dict[str, list[Part]] = {}
        for layer in path.layers:
            gate = by_name[layer.gate]
            experts = experts_of(gate) if layer.experts else []
            if layer.experts and max(layer.experts) >= len(experts):
                raise ValueError(
                    f"the path takes expert {max(layer.experts)} of the gate {gate.name!r}, which scores {len(experts)} experts"
                )
            self.parts[layer.gate] = [part for number in layer.experts for part in experts[number]]
            self.parts[layer.gate] += shared_experts_of(gate) if shared else []
        self.parts["also"] = [] if also is None else _named(model, also)

    def __enter__(self) -> ExpertPath:
        reshard(self.model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parts = [part for of_gate in self.parts.values() for part in of_gate]
        whole = {part.parameter for part in parts if part.index is None}
        slices: dict[nn.Parameter, list[Any]] = {}
        for part in parts:
            if part.index is not None and part.parameter not in whole:
                slices.setdefault(part.parameter, []).append(part.index)
        regions: dict[nn.Parameter, Region | None] = dict.fromkeys(whole)
        regions |= {parameter: Region(parameter, indices) for parameter, indices in slices.items()}
        if self.handle is not None:
            self.handle.advice.once("frozen")  # that gates are frozen is no surprise here
        self.guard = Guard(self.model, regions, self.freeze)
        entries = [entry(names[part.parameter], part) for part in parts]
        self.path.bind(
            entries,
            {gate: sum(part.numel for part in of_gate) for gate, of_gate in self.parts.items()},
            sum(parameter.numel() for parameter in self.model.parameters()),
        )
        self.guard.raise_()
        return self.path

    def __exit__(self, *_: object) -> None:
        self.guard.lower()
        if self.guard.foreign and not self.guard.steps:
            warnings.warn(
                "no optimizer has stepped a parameter on the path, though one has stepped others of the model; make it from "
                "the parameters of the model as it is now (after PEFT and sharding)",
                stacklevel=2,
            )


def _named(model: nn.Module, also: Any) -> list[Part]:
    rules = flat(also, _TAKE, "several of them")
    found: dict[nn.Parameter, None] = {}
    for rule in rules:
        matched: Iterable[nn.Parameter] = [
            parameter
            for name, module in model.named_modules()
            if name and meets(rule, name, module, _TAKE)
            for parameter in module.parameters()
        ]
        owners = dict(model.named_modules())
        if isinstance(rule, str):
            matched = [
                *matched,
                *(p for n, p in model.named_parameters() if meets(rule, n, owners[n.rpartition(".")[0]], _TAKE)),
            ]
        if not matched:
            raise ValueError(f"also={rule!r} matches no module and no parameter of {type(model).__name__}")
        found |= dict.fromkeys(matched)
    return [Part(parameter) for parameter in found]
