"""One forward as a graph: what each tensor was made of, and what one operation means.

Over 250 lines: what one operation means is read in one place. Knows nothing of how the graph is made (`trace`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

RANDOM = {
    "native_dropout",
    "bernoulli",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "normal",
    "multinomial",
    "randint",
    "randperm",
}
RANDOM_IN_PLACE = {"normal_", "uniform_", "exponential_", "bernoulli_", "random_", "log_normal_", "geometric_", "cauchy_"}
FRESH = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", *RANDOM_IN_PLACE} - {"bernoulli_"}
KEEPS_NOISE = {"mul", "div", "neg", "view", "to_copy", "unsqueeze", "expand", "permute", "t", "transpose", "clone", "detach"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "_cdist_forward", "_euclidean_dist", "_grouped_mm"}
_REDUCTIONS = {"sum", "mean", "linalg_vector_norm", "norm"}
_ELEMENTWISE = {
    "mul",
    "sub",
    "pow",
    "abs",
    "square",
    "neg",
    "div",
    "_to_copy",
    "view",
    "_unsafe_view",
    "unsqueeze",
    "expand",
    "permute",
}
_SAME = {"view", "_unsafe_view", "_to_copy", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "clone", "detach"}
# what makes scores of logits, and what chooses by them; an operation's name -> ours
SCORING = {"_softmax": "softmax", "_log_softmax": "softmax", "sigmoid": "sigmoid", "relu": "relu", "softplus": "sqrtsoftplus"}
CHOOSING = {"topk": "top-k", "argmax": "argmax", "max": "max", "sort": "sort"}
WIDEST = 4096  # outputs: beyond are vocabularies
FAR = 64  # operations between a gate's product and its scoring, at most


@dataclass(eq=False, slots=True)
class Node:
    """One tensor of the forward: of what it was made, never the tensor itself unless a candidate needs it."""

    op: Any = None  # None: a leaf
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None  # of an operation with several results
    shape: tuple[int, ...] = ()
    place: tuple[nn.Module, str] | None = None  # of a parameter or buffer
    static: bool = False  # made of parameters, buffers and constants alone
    tensor: Any = None  # a weak reference
    held: Tensor | None = None
    above: Any = None  # of a view: the tensor that it looks into, weakly
    call: Any = None  # in which it was made
    pure: bool = False  # random numbers, whatever the tokens
    noise: bool = False  # such numbers, times anything
    changed: bool = False  # a parameter that this forward has changed in place
    drawn: bool = False  # a number in its arguments was taken out of a tensor of this forward
    number: int = field(default=-1, init=False)  # in `Trace.order`; -1: not in it
    # both are asked for again and again
    name: str = field(init=False)
    operands: list[Node] = field(init=False)  # the tensors among its arguments, which never change

    def __post_init__(self) -> None:
        self.becomes(self.op)
        self.operands = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Node):
                self.operands.append(value)
            elif isinstance(value, (list, tuple)):
                self.operands.extend(part for part in value if isinstance(part, Node))

    def becomes(self, op: Any) -> None:
        self.op, self.name = op, "" if op is None else op._schema.name.removeprefix("aten::")

    @property
    def makes_noise(self) -> bool:
        return self.name in RANDOM or self.name in RANDOM_IN_PLACE

    def hold(self) -> None:
        if self.held is None and self.tensor is not None:
            self.held = self.tensor()


@dataclass(eq=False, slots=True)
class Call:
    """One call of a module: the nodes of its tensors, by where they are in its arguments and its output."""

    module: nn.Module
    name: str
    graph: bool  # gradients were on
    places: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    outer: Call | None = None
    begin: int = 0  # the operations that ran in it, by their place in `Trace.order`
    end: int = 0


@dataclass(eq=False, slots=True)
class Event:
    """Scores made, or a choice, over the outputs of a product of tokens with something made of parameters."""

    kind: str  # a key of SCORING or CHOOSING
    logits: Node  # its operand
    dim: int
    product: Node
    static: Node  # the product's factor that is made of parameters
    tokens: Node
    distance: int  # operations between the product and here
    noisy: bool  # noise was added on the way
    call: Call | None  # the innermost module that runs

    @property
    def width(self) -> int:
        return self.logits.shape[self.dim]


def softmax_written_out(node: Node) -> tuple[Node, int] | None:
    """exp / sum of the same: (exp, over which dimension)."""
    above, below = (*node.args, None)[:2]
    if not isinstance(above, Node) or not isinstance(below, Node) or above.name != "exp":
        return None
    while below.name in _SAME and below.operands:
        below = below.operands[0]
    if below.name != "sum" or below.args[0] is not above or len(below.args) < 2 or len(below.args[1]) != 1:
        return None
    return above, below.args[1][0]


def product_before(node: Node) -> tuple[Node, Node, Node, int, list[Node]] | None:
    """The nearest product of tokens with parameters behind this: (it, its two factors, how far, what lies between)."""
    node = calm(node)
    passed: list[Node] = []
    edge, seen = [(node, 0)], {node}
    while edge and len(passed) < FAR:
        here, distance = edge.pop(0)
        passed.append(here)
        if factors := factors_of(here):
            static, tokens = sorted(factors, key=lambda factor: not factor.static)
            if static.static and not tokens.static:
                below = product_at(tokens) if len(set(static.shape)) == 1 < len(static.shape) else None
                if below is None:
                    return here, static, tokens, distance, passed
                edge.insert(0, (below, distance + 1))  # scores, mixed: the matrix is the one that made them
            continue  # of tokens with tokens: attention
        for operand in map(calm, here.operands):
            if not operand.static and not operand.makes_noise and operand not in seen:
                seen.add(operand)
                edge.append((operand, distance + 1))
    return None


def product_at(node: Node, noise: bool = True) -> Node | None:
    """The product of tokens with parameters that this is, but for views, casts and, where asked for, noise."""
    had_noise = False
    for _ in range(8):
        had_noise, node = had_noise or calm(node) is not node, calm(node)
        factors = factors_of(node)
        if factors:
            return node if had_noise >= noise and {factor.static for factor in factors} == {True, False} else None
        if node.name not in _SAME or not node.operands:
            return None
        node = node.operands[0]
    return None


def calm(node: Node) -> Node:
    """The node that this one is without noise: what noise was added to, or what random numbers multiply."""
    while node.op is not None:
        operands = node.operands
        if node.name in ("add", "sub", "rsub"):
            rest = [operand for operand in operands if not operand.noise]
        elif node.name in ("mul", "div"):
            rest = [operand for operand in operands if not operand.pure]
        elif node.name == "native_dropout" and node.index == 0:
            rest = operands[:1]
        else:
            break
        if len(rest) != 1 or (len(rest) == len(operands) and node.name != "native_dropout") or rest[0].shape != node.shape:
            break
        node = rest[0]
    return node


def noisy(node: Node) -> bool:
    """Whether noise came in between this and the product of tokens with parameters that it was made of."""
    edge, seen = [node], {node}
    while edge and len(seen) < FAR:
        here = edge.pop(0)
        if here.op is None or here.static:
            continue
        if calm(here) is not here:
            return True
        factors = factors_of(here)
        if factors and any(factor.static for factor in factors):
            tokens = [factor for factor in factors if not factor.static]
            if len({*here.shape[-1:], *(f.shape[-1] for f in factors if f.shape)}) > 1 or any(calm(t) is t for t in tokens):
                continue
            return True  # K x K, over noisy scores
        for operand in here.operands:
            if operand not in seen and not operand.static:
                seen.add(operand)
                edge.append(operand)
    return False


def factors_of(node: Node) -> list[Node]:
    """The two factors of a product, or of a sum of products or of differences written out."""
    if node.name in _PRODUCTS:
        factors = [value for value in node.args if isinstance(value, Node)]
        if node.name == "convolution":
            return factors[:2]
        return factors[-2:] if len(factors) >= 2 else []
    if node.name in _REDUCTIONS and node.args and isinstance(node.args[0], Node):
        inner = node.args[0]
        for _ in range(4):
            operands = inner.operands
            if len(operands) == 2 and inner.name in ("mul", "sub") and {o.static for o in operands} == {True, False}:
                if max(len(o.shape) for o in operands if o.static) >= 2 and _spread(inner, operands):
                    return operands
                return []
            if inner.name not in _ELEMENTWISE or not operands:
                return []
            inner = operands[0]
    return []


def _spread(node: Node, operands: list[Node]) -> bool:
    """Whether tokens were paired with each row: the result is larger than the tokens are."""
    tokens = next(o for o in operands if not o.static)
    size = 1
    for length in tokens.shape:
        size *= length
    total = 1
    for length in node.shape or _broadcast(operands):
        total *= length
    return total > size


def _broadcast(operands: list[Node]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(o.shape for o in operands)))


def places_of(node: Node) -> list[Node]:
    """The parameters and buffers that a static node is made of."""
    found, edge, seen = [], [node], {node}
    while edge:
        here = edge.pop()
        if here.place is not None:
            found.append(here)
        for operand in here.operands:
            if operand not in seen:
                seen.add(operand)
                edge.append(operand)
    return found


def parameters_of(node: Node) -> Iterator[Tensor]:
    for leaf in places_of(node):
        tensor = leaf.tensor()
        if tensor is not None:
            yield tensor
