"""What scores are of: whether K alike modules, or slices of stacked parameters, are weighed by them or get what they choose."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from .judge import Seen
from .makers import Makers
from .nodes import Call, Node, factors_of, places_of, product_before
from .trace import Trace

_FAR = 24  # operations between a gate's scores and what they weigh, at most
# their results say which, no longer how much
_CHOICES = {"argmax", "gt", "ge", "lt", "le", "eq", "ne", "nonzero", "one_hot", "bincount", "argsort", "sign"}
_SLICES = {"select", "slice", "split", "split_with_sizes", "unbind", "index", "gather", "masked_select", "topk", "index_select"}
_JOINS = {"mul", "bmm", "baddbmm", "mm", "addmm", "div", "dot", "mv"}


@dataclass(eq=False, slots=True)
class _State:
    """What one tensor has of the scores."""

    weighs: int = -1  # operations since the scores, whose values are in it; -1: they are not
    sliced: bool = False  # some of the scores only
    chosen: bool = False  # what the scores chose is in it


class Parts:
    """The alike parts of a module."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    @cached_property
    def kinds(self) -> dict[int, int]:
        """Modules that have their like in the block, by id: the number of their kind."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        for module in self.block.modules():
            if module is not self.block and (like := _likeness(module)) is not None:
                kinds[like].append(id(module))
        return {module: number for number, kind in enumerate(kinds.values()) if len(kind) > 1 for module in kind}

    @cached_property
    def largest(self) -> int:
        sizes: dict[int, int] = defaultdict(int)
        for number in self.kinds.values():
            sizes[number] += 1
        return max(sizes.values(), default=0)

    @cached_property
    def lists(self) -> list[set[int]]:
        """Alike modules that stand in one list: of these not all need to have run."""
        lists = []
        for parent in self.block.modules():
            if not isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                continue
            found: dict[Any, set[int]] = defaultdict(set)
            for child in parent.children():
                if (like := _likeness(child)) is not None:
                    found[like].add(id(child))
            lists += [group for group in found.values() if len(group) > 1]
        return lists

    @cached_property
    def stacks(self) -> dict[int, set[int]]:
        """Ids of stacked parameters, by the number of their slices."""
        stacks: dict[int, set[int]] = defaultdict(set)
        for module in self.block.modules():
            if not isinstance(module, nn.modules.conv._ConvNd):
                for parameter in module.parameters(recurse=False):
                    if parameter.ndim >= 3:
                        stacks[parameter.shape[0]].add(id(parameter))
        return stacks


def _likeness(module: nn.Module) -> Any:
    shapes = [parameter.shape for parameter in module.parameters()]
    return (type(module), *shapes) if shapes else None


def alike(trace: Trace, block: Call, parts: Parts, one: Seen) -> bool:
    """Whether the scores and what K alike parts of a block make meet in one operation, or these get what the scores choose.

    Values of the scores are followed for a few operations, up to the next product with parameters.
    """
    count = one.width
    leaves = places_of(one.main.static)
    own = {id(leaf.tensor()) for leaf in leaves}
    sizes = {count}
    if math.prod(one.main.product.shape) == math.prod(one.main.logits.shape):  # all rows score: heads x experts
        sizes |= {leaf.shape[0] for leaf in leaves if len(leaf.shape) >= 2 and leaf.shape[0] % count == 0}
    stacks = set().union(*(parts.stacks.get(size, set()) for size in sizes)) - own
    for node in trace.order[block.begin : block.end]:  # flat ones, which the forward cuts into slices
        if node.static and len(node.shape) == 3 and node.shape[0] in sizes and node.op is not None:
            stacks |= {id(leaf.tensor()) for leaf in places_of(node) if len(leaf.shape) == 2} - own
    # one or two outputs may stand for no expert
    fewer = set().union(*(parts.stacks.get(size, set()) for size in (count - 1, count - 2) if size > 2)) - own
    if not (stacks or fewer) and parts.largest < count:
        return False
    groups = [group for group in parts.lists if count <= len(group) <= count + 2]
    product, found = one.main.product, product_before(one.main.logits)
    between = set() if found is None else set(found[4])
    makers = Makers(block.begin, product, between, _outputs(trace, block, parts.kinds, own), stacks)
    states: dict[Node, _State] = {product: _State(weighs=0)}
    nothing = _State()
    met: dict[int, set[int]] = defaultdict(set)  # experts that one of the scores each is multiplied with, by kind
    picked: dict[int, set[int]] = defaultdict(set)  # experts that get what was chosen
    for node in trace.order[max(block.begin, product.number + 1) : block.end]:
        operands = node.operands
        if node.static or not any(operand in states for operand in operands):
            continue
        given = [states.get(operand, nothing) for operand in operands]
        near = [state for state in given if state.weighs >= 0]
        chosen = any(state.chosen for state in given)
        weighted, of_stack = makers.weighted(node), makers.takes(node, stacks)
        joins = False
        if near and node.name in _JOINS:
            for_each = any(state.weighs >= 0 and sizes & set(o.shape) for o, state in zip(operands, given, strict=True))
            others = [operand for operand, state in zip(operands, given, strict=True) if state.weighs < 0]
            if (of_stack and weighted and for_each) or any(map(makers.stacked, others)):
                return True
            for operand in operands:
                experts = makers.experts(operand)
                numbers = {parts.kinds[expert] for expert in experts}
                for number in numbers:
                    here = {expert for expert in experts if parts.kinds[expert] == number}
                    if len(here) == count:
                        return True
                    if len(here) == 1 and any(other.sliced for other in near):
                        met[number] |= here
                joins = joins or bool(numbers)
            joins = joins or _spent(node, operands, given)
        if joins:
            makers.joined.add(node)
        if of_stack and ((weighted and chosen) or node.name in ("index", "index_select", "embedding")):
            return True  # slices of a stack, by the choice
        if chosen and (weighted or node.name in ("index", "index_select")) and makers.takes(node, fewer):
            return True
        if weighted and chosen:
            for expert in _experts_around(node, parts.kinds):
                picked[parts.kinds[expert]].add(expert)
        discrete = node.name in _CHOICES or (node.name in ("topk", "max", "sort") and node.index == 1)
        distance = min((state.weighs for state in near), default=_FAR)
        state = _State(
            weighs=distance + 1 if distance < _FAR and not (weighted or discrete or joins) else -1,
            sliced=bool(near) and (node.name in _SLICES or any(state.sliced for state in near)),
            chosen=not weighted and (chosen or (discrete and bool(near))),
        )
        if state.weighs >= 0 or state.chosen:
            states[node] = state
    # several layers of experts can share one gate
    if any(count in (len(experts), *(len(experts & group) for group in groups)) for experts in met.values()):
        return True
    return any(experts <= group for experts in picked.values() for group in groups)


def pairs(trace: Trace, product: Node) -> bool:
    """Whether scores are added to each other, each to each: their keys' pairs are the experts, as of product keys."""
    behind = {product}
    for node in trace.order:
        given = [operand for operand in node.operands if operand in behind]
        if not given:
            continue
        sizes = [math.prod(operand.shape) for operand in given]
        if node.name == "add" and len(given) == 2 and given[0] is not given[1] and math.prod(node.shape) > max(sizes):
            return True
        if not (factors_of(node) and any(operand.static for operand in node.operands)):
            behind.add(node)
    return False


def _spent(node: Node, operands: list[Node], given: list[_State]) -> bool:
    """Whether the scores were put on something larger that no expert made: tokens, as by a gate of channels or streams."""
    scores = max(math.prod(o.shape) for o, state in zip(operands, given, strict=True) if state.weighs >= 0)
    others = any(not (o.static or state.weighs >= 0 or state.chosen) for o, state in zip(operands, given, strict=True))
    return others and (node.name not in ("mul", "div") or math.prod(node.shape) > scores)


def _experts_around(node: Node, kinds: dict[int, int]) -> list[int]:
    """Those in whose calls an operation ran."""
    found, call = [], node.call
    while call is not None:
        if id(call.module) in kinds:
            found.append(id(call.module))
        call = call.outer
    return found


def _outputs(trace: Trace, block: Call, kinds: dict[int, int], own: set[int]) -> dict[Node, frozenset[int]]:
    """What modules of these kinds made in a call of the block; not the one that the gate is in."""
    found: dict[Node, frozenset[int]] = {}
    for call in trace.calls:
        if id(call.module) in kinds and block.begin <= call.begin and call.end <= block.end:
            if own & {id(parameter) for parameter in call.module.parameters()}:
                continue
            for node, place in call.places.items():
                if place[0] == "output":
                    found[node] = found.get(node, frozenset()) | {id(call.module)}
    return found
