"""Gates: which modules of a model route tokens to experts, where their matrices are, how their probabilities are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .adapters import adapts, on_parameter, refuse_what_is_no_weight
from .discover import observed_gates
from .evidence import beside_experts, counts_beside, counts_in, matrices, shaped
from .gate import Gate
from .names import bare_name
from .scoring import multiplied_from_left
from .trial import observe

__all__ = ["Gate", "find_gates"]

# A gate is called one of these words, alone or with the company listed; `gate_proj`, `output_gate` and
# `per_layer_input_gate` are the gates of something else.
GATE_NAME = re.compile(
    r"(?:(?:moe|experts?|tokens?|top_?k|noisy|sparse|mlp|ffn|base)_?)*"
    r"(?:gates?|gating|routers?|routing|wg|w_g|w_gate|w_gating|w_router|switch)"
    r"(?:_(?:gate|network|net|layer|linear|module|fn|weights?|matrix|logits))*"
)
_GATE_CLASS = re.compile(r"router|gating|(?:top_?k|top\d|moe|naive|noisy|switch|gshard|cosine|expert|token).*gate", re.I)


# beside experts these words are enough, in any company but of what is not scored
_GATE_WORD = re.compile(r"gat(?:e|es|ing)(?:_|\d|$)|rout|select|switch|dispatch|choos|assign", re.I)
_NO_GATE = re.compile(r"proj|per_layer|input|output|noise|bias|norm|scale|emb|att|head|conv|loss|aux|expert", re.I)


def find_gates(model: nn.Module, example: Any = None) -> list[Gate]:
    """The router gates of a model, found by structure; an empty list if it has none.

    A gate is a module (or a raw parameter) called gate, router, gating, w_g, switch or the like, or of a class called so, next
    to experts or with a count of experts of its own, that holds a matrix with one row (or column) for each expert. A copy of
    each is then tried on 16 random tokens, to see which of its outputs are logits and whether the weights that it hands out
    are softmax or sigmoid scores; where that fails (a gate that needs more than tokens) the class' attributes and its source
    decide. Nothing of the model is run or changed; a copy is tried only if its code touches nothing but what it is given.

    With an `example` the model itself runs once on it, without gradients, and is watched: tokens times something made of
    parameters, then softmax, sigmoid, relu or a choice over K outputs, which weigh or choose K alike modules or slices of
    stacked parameters, are a gate under any name; what was assumed of the others is confirmed or corrected.

    Args:
        example: a batch: a mapping of keywords, a tuple of arguments, or one argument; None: go by names.

    Warns:
        UserWarning: the forward on the example contradicts what is assumed of a gate and cannot correct it.

    **Shape**
        - Each gate's weight is `(experts, dim)`, whichever side is shorter.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(16, 4)
    ...         self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    >>> find_gates(nn.Sequential(Block(), Block()))
    [Gate('0.router', 4 experts x 16, softmax, output: logits), Gate('1.router', 4 experts x 16, softmax, output: logits)]
    """
    gates = gates_by_path(model)
    if example is not None:
        gates = observed_gates(model, gates, example)
    for gate in gates:
        gate.name = bare_name(model, gate.name)
    return gates


def gates_by_path(model: nn.Module) -> list[Gate]:
    """The same, named by their paths in the model, shells included."""
    search = _Search()
    gates: list[Gate] = []
    routers: set[int] = set()
    inside: list[str] = []  # prefixes of what lies in gates found so far
    with shaped(model):
        for name, block in model.named_modules():
            for path, router in _candidates(name, block):
                if id(router) in routers or f"{path}.".startswith(tuple(inside)):  # one module in two places: one hook
                    continue
                if found := search.gates_in(path, router, block):
                    gates += found
                    routers.add(id(router))
                    inside.append(f"{path}." if path else "")
            if not f"{name}.".startswith(tuple(inside)):
                beside = any(f"{gate.name}.".startswith(f"{name}.".lstrip(".")) for gate in gates)
                gates += search.raw_gates(name, block, beside)
    return gates


def looks_like_gate(name: str, module: nn.Module) -> bool:
    """By the name of the attribute or of the class."""
    return bool(GATE_NAME.fullmatch(name.lower()) or _GATE_CLASS.search(type(module).__name__))


def gate_in(name: str, module: nn.Module, parent: nn.Module | None) -> list[Gate]:
    """The gates in a module that the caller says is one, whatever its name and neighbours."""
    found = _Search().gates_in(name, module, parent if parent is not None else module)
    flat = [(path, matrix) for path, matrix in matrices(module) if matrix.ndim == 2]
    if found or len(flat) != 1:  # of several nothing tells which
        return found
    ((path, matrix),) = flat
    count = len(matrix)
    beside = set() if parent is None else counts_in(parent) | counts_beside(parent, module)
    if count % 2 == 0 and count not in beside and count // 2 in beside:  # logits, then the widths of their noise
        count //= 2
    return _Search().read_as(name, module, parent, path, matrix, count)


def gate_of(name: str, owner: nn.Module, attribute: str, parent: nn.Module | None) -> list[Gate]:
    """The gate whose matrix the caller says is this parameter."""
    matrix: Tensor = getattr(owner, attribute)
    counts = counts_in(owner) | counts_beside(owner, None) | (counts_beside(parent, owner) if parent is not None else set())
    rows, columns = matrix.shape
    if (rows in counts) == (columns in counts):  # the neighbours do not tell
        count = columns if multiplied_from_left(owner, attribute) else rows
    else:
        count = rows if rows in counts else columns
    found = _Search().read_as(name, owner, None, attribute, matrix, count)
    for gate in found:
        gate.block = owner if parent is None or beside_experts(owner) else parent
    return found


def _candidates(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not name and _GATE_CLASS.search(type(block).__name__):
        yield name, block
    among_experts = beside_experts(block)
    for child_name, child in block.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        said = among_experts and _GATE_WORD.search(child_name) and not _NO_GATE.search(child_name)
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and (said or GATE_NAME.fullmatch(child_name.lower())):
            yield from _elements(path, child)
        elif said or looks_like_gate(child_name, child):
            yield path, child


def _elements(path: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is in lists, in lists of them as well."""
    for key, element in container.named_children():
        if isinstance(element, (nn.ModuleList, nn.ModuleDict)):
            yield from _elements(f"{path}.{key}", element)
        else:
            yield f"{path}.{key}", element


class _Search:
    """One search through a model."""

    def __init__(self) -> None:
        self.settled: dict[Any, Any] = {}  # what trials of gates have shown

    def gates_in(self, name: str, router: nn.Module, block: nn.Module) -> list[Gate]:
        peft: Any = router
        if hasattr(router, "modules_to_save") and hasattr(router, "active_adapters"):
            key = peft.active_adapters[0]  # the copy that trains
            return self.gates_in(f"{name}.modules_to_save.{key}", peft.modules_to_save[key], block)
        if adapts(router):
            wrapped = self.gates_in(f"{name}.base_layer", peft.base_layer, block)
            for gate in wrapped:
                gate.adapter = router
                if not on_parameter(router):  # the layer's own output holds the logits, the adapter's part in them
                    refuse_what_is_no_weight(name, router, gate.matrix)
                    gate.name, gate.module, gate.parameter = name, router, f"base_layer.{gate.parameter}"
            return wrapped
        candidates = list(matrices(router))
        # a config is the whole model's: where no experts stand, it says nothing of a plain layer, as of attention's own gate
        own = isinstance(router, nn.Linear) and not beside_experts(block)
        counts = counts_in(router) | counts_in(block, own) | counts_beside(block, router)
        owners = [type(router.get_submodule(path.rpartition(".")[0])) for path, _ in candidates]
        if not counts and beside_experts(block) and owners == [nn.Linear]:
            # the only layer of a router whose experts do not tell their number; one output is a choice among tokens
            counts = {len(candidates[0][1])} - {1}
        doubtful: list[Gate] = []
        for slack in range(5 if _GATE_CLASS.search(type(router).__name__) else 1):
            for path, parameter in reversed(candidates):
                sides = parameter.shape if parameter.ndim > 1 else ()
                if isinstance(router.get_submodule(path.rpartition(".")[0]), nn.Linear):
                    sides = sides[:1]  # one row for each output, never a column
                for count in sorted(counts, reverse=True):
                    if sides and (count + slack in sides[-2:] or (parameter.ndim == 3 and count == sides[-1])):
                        gates = self.read_as(name, router, block, path, parameter, count + slack)
                        # of several of this shape, the one that the weights handed out are scores of
                        if not any(gate.assumed for gate in gates):
                            return gates
                        doubtful = doubtful or gates
                        break
                    if not sides and parameter.numel() % count == 0 and parameter.numel() > count:
                        return self.read_as(name, router, block, path, parameter, count)
            if doubtful:
                break
        return doubtful

    def raw_gates(self, name: str, block: nn.Module, beside: bool = False) -> list[Gate]:
        """A matrix that is a parameter of the block itself."""
        gates: list[Gate] = []
        counts = counts_in(block) | counts_beside(block, None)
        for path, parameter in block.named_parameters(recurse=False):
            if GATE_NAME.fullmatch(path.lower()) and parameter.ndim == 2 and set(parameter.shape) & counts:
                count = max(set(parameter.shape) & counts)
                gates += self.read_as(f"{name}.{path}".lstrip("."), block, None, path, parameter, count)
        if gates or beside or not beside_experts(block):
            return gates
        # the only matrix over experts that a block has is its gate, under any name
        only = [
            (path, parameter)
            for path, parameter in block.named_parameters(recurse=False)
            if parameter.ndim == 2 and set(parameter.shape) & counts and not _NO_GATE.search(path.replace("expert", ""))
        ]
        if len(only) == 1:
            ((path, parameter),) = only
            count = max(set(parameter.shape) & counts)
            gates += self.read_as(f"{name}.{path}".lstrip("."), block, None, path, parameter, count)
        return gates

    def read_as(
        self, name: str, router: nn.Module, block: nn.Module | None, path: str, matrix: Tensor, count: int
    ) -> list[Gate]:
        """The gates whose matrix this is, with their orientation and their reading settled."""
        rows = matrix.shape[-2] if matrix.ndim > 1 else count
        owner = router.get_submodule(path.rpartition(".")[0])
        by_rows = isinstance(owner, nn.Linear) or (rows == count and not multiplied_from_left(owner, path.rpartition(".")[2]))
        transposed = not by_rows and matrix.ndim > 1 and (matrix.shape[-1] == count)
        indices: Iterable[int | None] = range(len(matrix)) if matrix.ndim == 3 else [None]
        gates = []
        for index in indices:
            gate = Gate(name, router, count, path, transposed=transposed, index=index, reads="input")
            gate.block = router if block is None else block
            gates.append(observe(gate, block, self.settled))
            gate.name += "" if index is None else f"[{index}]"
        return gates
