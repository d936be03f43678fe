"""What one real forward computes: every operation with where its operands came from, and the calls of the modules.

Over 250 lines: what one operation means is read in one place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_RANDOM = {
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
_RANDOM_IN_PLACE = {"normal_", "uniform_", "exponential_", "bernoulli_", "random_", "log_normal_", "geometric_", "cauchy_"}
_FRESH = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", *_RANDOM_IN_PLACE} - {"bernoulli_"}
_KEEPS_NOISE = {"mul", "div", "neg", "view", "to_copy", "unsqueeze", "expand", "permute", "t", "transpose", "clone", "detach"}
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
_WIDEST = 4096  # outputs: beyond are vocabularies
_FAR = 64  # operations between a gate's product and its scoring, at most


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

    @property
    def name(self) -> str:
        return "" if self.op is None else self.op._schema.name.removeprefix("aten::")

    @property
    def makes_noise(self) -> bool:
        return self.name in _RANDOM or self.name in _RANDOM_IN_PLACE

    def operands(self) -> list[Node]:
        found: list[Node] = []
        tree_map(lambda value: found.append(value) if isinstance(value, Node) else None, [*self.args, *self.kwargs.values()])
        return found

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


class Trace(TorchDispatchMode):
    """Watches one forward of a model. `watched`: ids of the parameters whose products matter; None: any. `kept`: ids of
    modules whose calls are kept whole. `others`: where not any matters, note the other products all the same, without values.

    Below autograd and autocast, so that casts are seen, and what runs is what would run: no result is touched.
    """

    def __init__(
        self, model: nn.Module, watched: set[int] | None = None, kept: Container[int] = (), others: bool = False
    ) -> None:
        super().__init__()
        self.order: list[Node] = []  # all that was made, where not all is known yet
        self.ordered = watched is None or others
        self.keep, self.kept = kept, defaultdict[int, list[Any]](list)  # whole calls of some modules, by id
        self.model, self.watched = model, watched
        self.nodes: Any = WeakIdKeyDictionary()
        self.events: list[Event] = []
        self.others: list[Event] = []
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.placed: set[Node] = set()  # those that a module was given or gave
        self.drawn: set[float] = set()  # numbers that Python took out of tensors made of tokens
        self.paused = False
        self.failed: Exception | None = None
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            self._own(module)
            self._hooks.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(self._left, with_kwargs=True, always_call=True, prepend=True))

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin inside of the model's own call, whose pre-hooks are running."""
        self.__enter__()
        self._entered("")(self.model, args, kwargs)

    def stop(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.__exit__(None, None, None)
        while self.open:
            self._left(self.open[-1].module, args, kwargs, output)
        # where an exception passes by, torch is on its way through the model's own hooks
        self.remove_hooks(2 if output is None else 0)
        if output is None:
            for kept in (self.order, self.events, self.others, self.calls, self.placed, self.kept, self.nodes):
                kept.clear()

    def remove_hooks(self, but: int = 0) -> None:
        """All, or all but the first, which are the model's own."""
        for hook in self._hooks[but:]:
            hook.remove()

    # modules ----------------------------------------------------------------------------------------------------------

    def _own(self, module: nn.Module) -> None:
        # at each call again: sharding engines put whole parameters in the place of their parts for it
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor not in self.nodes:
                self.nodes[tensor] = Node(shape=tuple(tensor.shape), place=(module, name), static=True, tensor=ref(tensor))

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.open and self.open[-1].module is module and len(self.open) == 1 and module is self.model:
                return  # noted by `start`
            self._own(module)
            call = Call(
                module, name, torch.is_grad_enabled(), outer=self.open[-1] if self.open else None, begin=len(self.order)
            )
            self._note_places(call, "args", args)
            self._note_places(call, "kwargs", kwargs)
            self.open.append(call)
            self.calls.append(call)

        return hook

    def _left(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if any(call.module is module for call in self.open):
            while self.open.pop().module is not module:
                pass
            call = next(call for call in reversed(self.calls) if call.module is module and call not in self.open)
            call.end = len(self.order)
            self._note_places(call, "output", output)
            if id(module) in self.keep:
                self.kept[id(module)].append((args, kwargs, output))

    def _note_places(self, call: Call, part: str, value: Any) -> None:
        for path, tensor in tree_flatten_with_path(value)[0]:
            if isinstance(tensor, Tensor):
                if tensor not in self.nodes:
                    self.nodes[tensor] = Node(shape=tuple(tensor.shape), tensor=ref(tensor))
                node = self.nodes[tensor]
                if not node.static:
                    place = (part, *(getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path))
                    self.placed.add(node)
                    call.places[node] = place  # the last: an output rather than the argument that it is

    # operations -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused and func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._keep_scores(args[0])
        result = func(*args, **(kwargs or {}))
        if not self.paused:
            try:
                self._note(func, args, kwargs or {}, result)
            except Exception as problem:  # whatever it is, the user's forward goes on
                self.failed, self.paused = problem, True
        return result

    def _keep_scores(self, tensor: Tensor) -> None:
        """Scores are held as they are before they are changed in place."""
        node = self.nodes.get(tensor)
        if node is None or not (node.held is tensor or (node.held is None and node in self.placed)):
            return
        if (found := _product_at(node, noise=False)) is not None:
            static = next(factor for factor in factors_of(found) if factor.static)
            if self.watched is None or any(id(p) in self.watched for p in parameters_of(static)):
                node.held = tensor.clone()

    def _node_of(self, tensor: Tensor) -> Node:
        node = self.nodes.get(tensor)
        if node is None:  # made before the forward: a constant
            node = self.nodes[tensor] = Node(shape=tuple(tensor.shape), static=True, tensor=ref(tensor))
            node.held = tensor if tensor.numel() <= 2**20 else None
        return node

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        own = func._schema.name.rpartition("::")[2]
        given, named = tree_map(lambda v: self._node_of(v) if isinstance(v, Tensor) else v, (args, kwargs))
        node = Node(func, tuple(given), named)
        operands = node.operands()
        node.static = own not in _RANDOM and own not in _RANDOM_IN_PLACE and all(operand.static for operand in operands)
        node.call = self.open[-1] if self.open else None
        fixed = [operand for operand in operands if not operand.pure]
        node.pure = (own in _FRESH) or (all(o.static for o in fixed) and (node.makes_noise or len(fixed) < len(operands)))
        node.noise = node.pure or (own.strip("_") in _KEEPS_NOISE and any(operand.noise for operand in operands))
        if own == "_local_scalar_dense" and not node.static and isinstance(result, float):
            self.drawn |= {result, -result, 1 / result} if result else {result}
        node.drawn = bool(self.drawn) and any(type(v) is float and v in self.drawn for v in (*args, *(kwargs or {}).values()))
        if func._schema.is_mutable:
            self._changed(func, own, node, args, result)
            return
        several = isinstance(result, (tuple, list))
        for index, tensor in enumerate(result if several else [result]):
            if not isinstance(tensor, Tensor):
                continue
            if not several:
                made = node
            else:
                made = replace(node, index=index)
            made.shape, made.tensor = tuple(tensor.shape), ref(tensor)
            if args and isinstance(args[0], Tensor) and func._schema.returns[0].alias_info is not None:
                made.above = ref(args[0])
            self.nodes[tensor] = made
            if self.ordered:
                self.order.append(made)
        if own in SCORING or own in CHOOSING:
            self._event(own, node, args, kwargs)
        elif own == "div" and (written := _softmax_written_out(node)) is not None:
            exp, dim = written
            logits = Node(torch.ops.aten.log.default, (exp,), shape=exp.shape, held=args[0].detach().log())
            self._event("_softmax", Node(args=(logits, dim)), args, {})

    def _changed(self, func: Any, own: str, node: Node, args: Any, result: Any) -> None:
        """An operation in place: the same one out of place, where there is one, made the tensor what it is now."""
        target = args[0] if own.endswith("_") and args and isinstance(args[0], Tensor) else None
        if target is None:  # out=..., statistics of norms: nothing is known of the results
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and not any(tensor is other for other in args):
                    place = self.nodes[tensor].place if tensor in self.nodes else None
                    self.nodes[tensor] = Node(shape=tuple(tensor.shape), place=place, static=node.static, tensor=ref(tensor))
            return
        before = self.nodes[target]
        packet = getattr(torch.ops.aten, own[:-1], None)
        if own not in _RANDOM_IN_PLACE:
            node.op = getattr(packet, func._overloadname, None)
        node.shape, node.tensor, node.above = tuple(target.shape), ref(target), before.above
        if before.place is not None:  # a parameter is what it is when asked for
            node = Node(shape=before.shape, place=before.place, static=True, tensor=ref(target), changed=True)
            self.nodes[target] = node
        else:
            self.nodes[target] = node if node.op is not None else Node(shape=tuple(target.shape), tensor=ref(target))
        if self.ordered:
            self.order.append(node)
        above = before.above
        while above is not None and (tensor := above()) is not None:  # what it looks into has changed as well
            above = self.nodes[tensor].above if tensor in self.nodes else None
            self.nodes[tensor] = Node(shape=tuple(tensor.shape), tensor=ref(tensor), above=above)

    def _event(self, own: str, node: Node, args: Any, kwargs: Any) -> None:
        logits = node.args[0]
        if not isinstance(logits, Node) or logits.static or not logits.shape:
            return
        if isinstance(args[0], Tensor) and not args[0].is_floating_point():
            return
        dim = -1
        if own in ("_softmax", "_log_softmax"):
            dim = node.args[1]
        elif own in CHOOSING:
            given = node.args[1:] if own != "topk" else node.args[2:]
            dim = next((value for value in given if type(value) is int), kwargs.get("dim", -1))
        if not isinstance(dim, int) or not 1 <= logits.shape[dim] <= _WIDEST:
            return
        found = product_before(logits)
        if found is None:
            return
        product, static, tokens, distance, passed = found
        if logits.shape[dim] > max(product.shape[-3:], default=0 if len(product.shape) else 1):
            return
        call = self.open[-1] if self.open else None
        event = Event(own, logits, dim % len(logits.shape), product, static, tokens, distance, noisy(logits), call)
        if self.watched is not None and not any(id(p) in self.watched for p in parameters_of(static)):
            if self.ordered:
                self.others.append(event)
            return
        for passing in (logits, tokens, *passed):
            passing.hold()
        self._hold_above(tokens)
        self.events.append(event)

    def _hold_above(self, node: Node) -> None:
        """What modules were given or gave, of what the tokens were made of a little before."""
        edge, seen = [node], {node}
        while edge and len(seen) < _FAR:
            here = edge.pop(0)
            if here in self.placed:
                here.hold()
            for operand in map(calm, here.operands()):
                if not operand.static and operand not in seen:
                    seen.add(operand)
                    edge.append(operand)


def _softmax_written_out(node: Node) -> tuple[Node, int] | None:
    """exp / sum of the same: (exp, over which dimension)."""
    above, below = (*node.args, None)[:2]
    if not isinstance(above, Node) or not isinstance(below, Node) or above.name != "exp":
        return None
    while below.name in _SAME and below.operands():
        below = below.operands()[0]
    if below.name != "sum" or below.args[0] is not above or len(below.args) < 2 or len(below.args[1]) != 1:
        return None
    return above, below.args[1][0]


def product_before(node: Node) -> tuple[Node, Node, Node, int, list[Node]] | None:
    """The nearest product of tokens with parameters behind this: (it, its two factors, how far, what lies between)."""
    node = calm(node)
    passed: list[Node] = []
    edge, seen = [(node, 0)], {node}
    while edge and len(passed) < _FAR:
        here, distance = edge.pop(0)
        passed.append(here)
        if factors := factors_of(here):
            static, tokens = sorted(factors, key=lambda factor: not factor.static)
            if static.static and not tokens.static:
                below = _product_at(tokens) if len(set(static.shape)) == 1 < len(static.shape) else None
                if below is None:
                    return here, static, tokens, distance, passed
                edge.insert(0, (below, distance + 1))  # scores, mixed: the matrix is the one that made them
            continue  # of tokens with tokens: attention
        for operand in map(calm, here.operands()):
            if not operand.static and not operand.makes_noise and operand not in seen:
                seen.add(operand)
                edge.append((operand, distance + 1))
    return None


def _product_at(node: Node, noise: bool = True) -> Node | None:
    """The product of tokens with parameters that this is, but for views, casts and, where asked for, noise."""
    had_noise = False
    for _ in range(8):
        had_noise, node = had_noise or calm(node) is not node, calm(node)
        factors = factors_of(node)
        if factors:
            return node if had_noise >= noise and {factor.static for factor in factors} == {True, False} else None
        if node.name not in _SAME or not node.operands():
            return None
        node = node.operands()[0]
    return None


def calm(node: Node) -> Node:
    """The node that this one is without noise: what noise was added to, or what random numbers multiply."""
    while node.op is not None:
        operands = node.operands()
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
    while edge and len(seen) < _FAR:
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
        for operand in here.operands():
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
            operands = inner.operands()
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
        for operand in here.operands():
            if operand not in seen:
                seen.add(operand)
                edge.append(operand)
    return found


def parameters_of(node: Node) -> Iterator[Tensor]:
    for leaf in places_of(node):
        tensor = leaf.tensor()
        if tensor is not None:
            yield tensor
