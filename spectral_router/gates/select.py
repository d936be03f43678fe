"""Which gates of a model are meant: by default all that are found, else those that the caller names."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Union

from torch import nn

from .._rules import flat, meets
from .discover import observed_gates
from .evidence import beside_experts, matrices, shaped
from .find import Gate, gate_in, gate_of, gates_by_path, looks_like_gate
from .names import bare_name

# a name or its suffix, a regular expression for the full name, a module class, a predicate, a Gate; or several of them
Selector = Union[str, "re.Pattern[str]", type[nn.Module], Callable[[str, nn.Module], bool], Gate, Iterable["Selector"]]


_TAKE = "gates and exclude take"


def select_gates(model: nn.Module, gates: Selector | None, exclude: Selector | None, example: Any = None) -> list[Gate]:
    found = gates_by_path(model)
    if example is not None:
        found = observed_gates(model, found, example)
    with shaped(model):
        chosen = found if gates is None else _named(model, gates, found)
    for gate in chosen:
        gate.name = bare_name(model, gate.name)
    if exclude is not None:
        wanted = flat(exclude, _TAKE, "Gate objects", Gate)
        kept = [
            gate for gate in chosen if not any(meets(rule, gate.name, gate.module, _TAKE) or rule is gate for rule in wanted)
        ]
        if len(kept) == len(chosen):
            raise ValueError(f"exclude={exclude!r} matches none of the gates: {', '.join(gate.name for gate in chosen)}")
        if not kept:
            raise ValueError(f"exclude={exclude!r} leaves none of the gates: {', '.join(gate.name for gate in chosen)}")
        chosen = kept
    _warn_of_quantised(model, chosen)
    if not chosen and (near := _gate_like(model)[:5]):
        raise ValueError(
            f"no router gate found in {type(model).__name__}{_hint(near)}; name the gates with "
            'gates=: a suffix such as "mlp.gate", a class, or Gate objects'
        )
    if not chosen:  # a pipeline stage of dense layers, and nothing that could be meant
        warnings.warn(
            f"no router gate in {type(model).__name__}, so nothing is added; if it has one, name it with gates=: a suffix such "
            'as "mlp.gate", a class, or Gate objects',
            stacklevel=4,
        )
    return chosen


def refuse_without_logits(gates: list[Gate]) -> None:
    """An error that names the gates which a balance loss of logits cannot read."""
    without = [gate for gate in gates if not gate.has_logits]
    if without:
        raise ValueError(
            'the balance loss reads logits (reads="logits"), but of these gates no logit for each expert can be read: '
            f"{', '.join(f'{gate.name} ({gate.how})' for gate in without)}; leave them out with "
            f"exclude={[gate.name for gate in without]}, or take a balance loss that reads probabilities"
        )


def _named(model: nn.Module, gates: Selector, found: list[Gate]) -> list[Gate]:
    chosen: list[Gate] = []
    modules = dict(model.named_modules())
    for rule in flat(gates, _TAKE, "Gate objects", Gate):
        if isinstance(rule, Gate):
            if rule.module not in modules.values():
                raise ValueError(f"the module of Gate {rule.name!r} is not a part of {type(model).__name__}")
            matched = [rule]
        else:
            names = [
                name
                for name, module in modules.items()
                if name and (meets(rule, name, module, _TAKE) or meets(rule, bare_name(model, name), module, _TAKE))
            ]
            matched = [gate for name in names for gate in _at(name, modules, found)]
            if isinstance(rule, (str, re.Pattern)):
                matched += _parameters(model, rule, modules, found)
        if not matched:
            raise ValueError(_unmatched(model, rule, modules))
        chosen += [gate for gate in matched if all(gate.name != other.name for other in chosen)]
    return chosen


def _unmatched(model: nn.Module, rule: Selector, modules: dict[str, nn.Module]) -> str:
    """What a rule that gave no gate has met, else what is near it."""
    for name, module in modules.items():
        if name and meets(rule, name, module, _TAKE) and (several := _matrices_of(name, module)):
            return (
                f"gates={rule!r} matches {name}, which has {len(several)} matrices, and nothing tells which of them scores the "
                f"experts: name one of {', '.join(several)}"
            )
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            if isinstance(rule, (str, re.Pattern)) and meets(rule, path, modules[path.rpartition(".")[0]], _TAKE):
                learns = "is read and does not learn" if kind == "buffer" else f"is {tensor.ndim}-D"
                return (
                    f"gates={rule!r} matches the {kind} {path} of shape {tuple(tensor.shape)}, which {learns}, so its rows are "
                    f"not known to be experts: pass gates=Gate(name, module, num_experts, {path.rpartition('.')[2]!r}, "
                    "probs=function), where function(module, args, kwargs, output) gives the probabilities"
                )
    # each ending once, with the first full name that has it
    endings = {re.sub(r"^.*?\.\d+\.", "", name): name for name in reversed(modules) if name}
    close = [endings[ending] for ending in difflib.get_close_matches(str(rule), endings, 5, 0.3)]
    close += difflib.get_close_matches(str(rule), modules, 5, 0.6)
    like = set(_gate_like(model))
    near = sorted(dict.fromkeys(close), key=lambda name: name not in like)[:5]
    return (
        f"gates={rule!r} matches no parameter, and no module with one matrix or a matrix for its experts, in "
        f"{type(model).__name__}{_hint(near)}"
    )


def _matrices_of(name: str, module: nn.Module) -> list[str]:
    flat = [(path, matrix) for path, matrix in matrices(module) if matrix.ndim == 2]
    return [f"{name}.{path} ({matrix.shape[0]} x {matrix.shape[1]})" for path, matrix in flat] if len(flat) > 1 else []


def _at(name: str, modules: dict[str, nn.Module], found: list[Gate]) -> list[Gate]:
    """The gates that the search found at or below a named module, else what the module itself gives."""
    below = [gate for gate in found if f"{gate.name}.".startswith((f"{name}.", f"{name}["))]
    return below or gate_in(name, modules[name], modules.get(name.rpartition(".")[0]))


def _parameters(model: nn.Module, rule: str | re.Pattern[str], modules: dict[str, nn.Module], found: list[Gate]) -> list[Gate]:
    gates: list[Gate] = []
    for path, parameter in model.named_parameters():
        owner, _, attribute = path.rpartition(".")
        if parameter.ndim == 2 and meets(rule, path, modules[owner], _TAKE):
            known = [gate for gate in found if gate.matrix is parameter]
            gates += known or gate_of(path, modules[owner], attribute, modules.get(owner.rpartition(".")[0]))
    return gates


def _gate_like(model: nn.Module) -> list[str]:
    """Modules that are called gates, then the small ones and the matrices beside experts."""
    called = [name for name, module in model.named_modules() if looks_like_gate(name.rpartition(".")[2], module)]
    beside = []
    for name, block in model.named_modules():
        if beside_experts(block):
            own = [path for path, parameter in block.named_parameters(recurse=False) if parameter.ndim == 2]
            own += [
                path
                for path, child in block.named_children()
                if "expert" not in f"{path} {type(child).__name__}".lower() and next(matrices(child), None) is not None
            ]
            beside += [f"{name}.{path}".lstrip(".") for path in own]
    return list(dict.fromkeys(called + beside))


def _hint(names: list[str]) -> str:
    return f" (nearest: {', '.join(names)})" if names else ""


def _warn_of_quantised(model: nn.Module, chosen: list[Gate]) -> None:
    names = [
        name
        for name, module in model.named_modules()
        if looks_like_gate(name.rpartition(".")[2], module)
        and any(p.ndim == 2 and not p.is_floating_point() for p in module.parameters())
        and not any(gate.name.startswith(name) for gate in chosen)
    ]
    if names:
        warnings.warn(
            f"wrap_moe skips quantised gates, whose weights hold no numbers to penalise: {', '.join(names)}; keep them out "
            "of the quantisation (in transformers: modules_to_not_convert)",
            stacklevel=4,
        )
