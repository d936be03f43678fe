"""What one real forward computes: every operation with where its operands came from, and the calls of the modules.

Over 250 lines: one mode of torch's, whose parts share its state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.weak import WeakIdKeyDictionary

from .._sharding import sharded
from .nodes import (
    CHOOSING,
    FAR,
    FRESH,
    KEEPS_NOISE,
    RANDOM,
    RANDOM_IN_PLACE,
    SCORING,
    WIDEST,
    Call,
    Event,
    Node,
    calm,
    factors_of,
    noisy,
    parameters_of,
    product_at,
    product_before,
    softmax_written_out,
)


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
        self.sharded = sharded(model)  # what is not seen then may yet have been computed
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
        if (found := product_at(node, noise=False)) is not None:
            static = next(factor for factor in factors_of(found) if factor.static)
            if self.watched is None or any(id(p) in self.watched for p in parameters_of(static)):
                node.held = tensor.clone()

    def _node_of(self, tensor: Tensor) -> Node:
        node = self.nodes.get(tensor)
        if node is None:  # made before the forward: a constant
            node = self.nodes[tensor] = Node(shape=tuple(tensor.shape), static=True, tensor=ref(tensor))
            node.held = tensor if tensor.numel() <= 2**20 else None
        return node

    def _with_nodes(self, value: Any) -> Any:
        """An argument of an operation, a tensor or a list of them perhaps, with nodes for tensors."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        return [self._node_of(v) if isinstance(v, Tensor) else v for v in value] if isinstance(value, (list, tuple)) else value

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        own = func._schema.name.rpartition("::")[2]
        given = tuple(map(self._with_nodes, args))
        node = Node(func, given, {name: self._with_nodes(value) for name, value in kwargs.items()})
        operands = node.operands
        node.static = own not in RANDOM and own not in RANDOM_IN_PLACE and all(operand.static for operand in operands)
        node.call = self.open[-1] if self.open else None
        fixed = [operand for operand in operands if not operand.pure]
        node.pure = (own in FRESH) or (all(o.static for o in fixed) and (node.makes_noise or len(fixed) < len(operands)))
        node.noise = node.pure or (own.strip("_") in KEEPS_NOISE and any(operand.noise for operand in operands))
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
            self._put_in_order(made)
        if own in SCORING or own in CHOOSING:
            self._event(own, node, args, kwargs)
        elif own == "div" and (written := softmax_written_out(node)) is not None:
            exp, dim = written
            logits = Node(torch.ops.aten.log.default, (exp,), shape=exp.shape, held=args[0].detach().log())
            self._event("_softmax", Node(args=(logits, dim)), args, {})

    def _put_in_order(self, node: Node) -> None:
        if self.ordered:
            node.number = len(self.order)
            self.order.append(node)

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
        if own not in RANDOM_IN_PLACE:
            node.becomes(getattr(packet, func._overloadname, None))
        node.shape, node.tensor, node.above = tuple(target.shape), ref(target), before.above
        if before.place is not None:  # a parameter is what it is when asked for
            node = Node(shape=before.shape, place=before.place, static=True, tensor=ref(target), changed=True)
            self.nodes[target] = node
        else:
            self.nodes[target] = node if node.op is not None else Node(shape=tuple(target.shape), tensor=ref(target))
        self._put_in_order(node)
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
        if not isinstance(dim, int) or not 1 <= logits.shape[dim] <= WIDEST:
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
        while edge and len(seen) < FAR:
            here = edge.pop(0)
            if here in self.placed:
                here.hold()
            for operand in map(calm, here.operands):
                if not operand.static and operand not in seen:
                    seen.add(operand)
                    edge.append(operand)
