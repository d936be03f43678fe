"""How scores are made again from the tensors of one call of a module: the operations that a forward was seen to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .._precision import full_precision
from .._sharding import whole
from .live import Constant, Number, Own, modules_of, named_number
from .nodes import Call, Node, calm, noisy, product_before

_VIEWS = {"view", "_unsafe_view", "reshape"}
_UNSAID = {
    "view",
    "unsafe_view",
    "t",
    "to_copy",
    "expand",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "detach",
    "clone",
    "alias",
}
_MOST = 48  # operations: beyond, a module is not what the scores come from


class Ref(NamedTuple):
    """The value of a step of a recipe."""

    number: int


class Step(NamedTuple):
    op: str  # as in torch.ops
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of the first operand and of the result, when it was seen


class Recipe:
    """Makes scores `(*, K)` of the arguments and the output of one call of a module, with a graph to tokens and parameters.

    Holds modules and names, no tensors of a forward: it follows copies and files of the model.
    """

    def __init__(self, sources: list[Any], shapes: list[tuple[int, ...]], steps: list[Step], result: int, dim: int) -> None:
        self.sources, self.shapes, self.steps, self.result, self.dim = sources, shapes, steps, result, dim

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        parts = {"args": args, "kwargs": kwargs, "output": output}
        scores = self.of([_at(parts, source) for source in self.sources if isinstance(source, tuple)])
        # no view of what the module gave, which its caller is free to change in place
        return scores.clone() if all(step.op.split(".")[1].strip("_") in _UNSAID for step in self.steps) else scores

    def __repr__(self) -> str:
        """From what, and by which operations besides views and casts."""
        start = sorted({_said(source) for source in self.sources if isinstance(source, tuple)})
        names = [step.op.split(".")[1].strip("_") for step in self.steps]
        done = [name for name in dict.fromkeys(names) if name not in _UNSAID]
        return f"{' and '.join(start)}{': ' if done else ''}{', '.join(done)}"

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The same of the tensors that it starts from, in order."""
        values: list[Any] = []
        lengths: dict[int, int] = {}
        ahead = iter(tensors)
        for source, shape in zip(self.sources, self.shapes, strict=True):
            value = next(ahead) if isinstance(source, tuple) else source()
            values.append(whole(value))
            if isinstance(source, tuple):
                for seen, now in zip(shape[:-1], value.shape[:-1], strict=False):
                    lengths.setdefault(seen, now)
                lengths.setdefault(math.prod(shape[:-1]), math.prod(value.shape[:-1]))
        device = values[0].device
        with full_precision(device):
            for step in self.steps:
                given, named = tree_map(
                    lambda v: values[v.number] if isinstance(v, Ref) else v() if isinstance(v, Number) else v,
                    (step.args, step.kwargs),
                    is_leaf=_is_ref,
                )
                if "batch_norm" in step.op:
                    values.append(self._normalised(step, list(given)))
                else:
                    values.append(_run(step, list(given), named, lengths))
        return values[self.result].movedim(self.dim, -1)

    @property
    def over_batch(self) -> bool:
        """Whether a token's scores depend on the other tokens', as behind batch norm."""
        return any("batch_norm" in step.op for step in self.steps)

    def _normalised(self, step: Step, given: list[Any]) -> Tensor:
        """Batch norm by the batch in training; running statistics are read, never moved a second time."""
        x, weight, bias, mean, var, training, _, eps = given[:8]
        place = step.args[3]
        owner = self.sources[place.number] if isinstance(place, Ref) and place.number < len(self.sources) else None
        if isinstance(owner, Own):
            training = owner.module.training
        if training or mean is None:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


def _run(step: Step, given: list[Any], named: dict[str, Any], lengths: dict[int, int]) -> Any:
    _, name, overload = step.op.split(".")
    if name in _VIEWS:
        return given[0].reshape(_resized(step, given[0].shape, lengths))
    if name == "expand":
        before = (1,) * (len(given[1]) - len(step.shapes[0])) + step.shapes[0]
        given[1] = [-1 if old == new != 1 else lengths.get(new, new) for old, new in zip(before, given[1], strict=True)]
        given[1] = [length if i >= len(given[1]) - given[0].ndim or length != -1 else 1 for i, length in enumerate(given[1])]
    result = getattr(getattr(torch.ops.aten, name), overload)(*given, **named)
    return result if step.place is None else result[step.place]


def _resized(step: Step, now: torch.Size, lengths: dict[int, int]) -> list[int]:
    """The shape that a view would have had of a tensor of another batch: where groups of lengths grew, the view's grow too."""
    seen, wanted = list(step.shapes[0]), list(step.shapes[1])
    if tuple(now) == tuple(seen):
        return wanted
    shape: list[int] = []
    i = j = 0
    while i < len(seen) or j < len(wanted):
        left, right = i, j
        a = b = 1
        if i < len(seen):
            a, i = seen[i], i + 1
        if j < len(wanted):
            b, j = wanted[j], j + 1
        while a != b:
            if (a < b and i < len(seen)) or j >= len(wanted):
                a, i = a * seen[i], i + 1
            else:
                b, j = b * wanted[j], j + 1
        total, group = math.prod(now[left:i]), wanted[right:j]
        if total != a:
            if group.count(1) >= len(group) - 1:
                group = [total if length != 1 else 1 for length in group] if math.prod(group) > 1 else [total, *group[1:]]
            else:
                group = [lengths.get(length, length) for length in group]
        shape += group
    return shape


def _at(parts: dict[str, Any], path: tuple[Any, ...]) -> Tensor:
    value: Any = parts
    for key in path:
        value = getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
    return value


def _said(path: tuple[Any, ...]) -> str:
    return path[0] + "".join(f"[{key!r}]" for key in path[1:])


class UnknownError(Exception):
    """The scores cannot be made of what this call had."""


def recipe_for(target: Node, dim: int, call: Call) -> tuple[Recipe, list[Node]] | None:
    """The recipe from one call to a node, without noise, and the nodes that it starts from; None if there is none."""
    sources: list[Any] = []
    nodes: list[Node] = []
    steps: list[Node] = []
    order: dict[Node, int] = {}  # position among sources or, after them, among steps
    found = product_before(target)
    scored = set() if found is None else {target, *found[4]}  # where noise is to be left out
    around = modules_of(found[0].call) if found is not None else []

    def plain(node: Node) -> Node:
        """Itself where the module had it, unless noise is in it; else what it is without noise."""
        if node in call.places and not (node in scored and noisy(node)):
            return node
        return calm(node)

    def visit(node: Node, deep: int = 0) -> Node:
        node = plain(node)
        if node in order:
            return node
        if deep > 2 * _MOST or len(steps) > 2 * _MOST:
            raise UnknownError
        given = node in call.places and not (node in scored and noisy(node))
        if given or node.op is None:
            if node.changed and call.module not in around:
                raise UnknownError  # its call may be over before the change
            if given:
                sources.append(call.places[node])
            elif node.place is not None:
                sources.append(Own(*node.place))
            elif node.static and node.held is not None:
                sources.append(Constant(node.held))
            else:
                raise UnknownError
            order[node] = -len(sources)
            nodes.append(node)
            return node
        if node.makes_noise or node.drawn or node.op._schema.is_mutable or (node.index and "batch_norm" in node.name):
            raise UnknownError
        for operand in node.operands:
            visit(operand, deep + 1)
        steps.append(node)
        order[node] = len(steps)
        return node

    try:
        last = visit(target)
    except UnknownError:
        return None
    if not any(isinstance(source, tuple) for source in sources):
        return None
    if sum(not step.static for step in steps) > _MOST:
        return None

    def number(node: Node) -> int:
        node = plain(node)
        return -order[node] - 1 if order[node] < 0 else len(sources) + order[node] - 1

    made = []
    for node in steps:
        where = modules_of(node.call)
        args, kwargs = tree_map(
            lambda v: Ref(number(v)) if isinstance(v, Node) else named_number(v, where) if type(v) is float else v,  # noqa: B023
            (node.args, node.kwargs),
        )
        first = next((v for v in node.args if isinstance(v, Node)), None)
        made.append(Step(str(node.op), args, kwargs, node.index, (first.shape if first else (), node.shape)))
    recipe = Recipe(sources, [node.shape for node in nodes], made, number(last), dim)
    return recipe, [node for node, source in zip(nodes, sources, strict=True) if isinstance(source, tuple)]
