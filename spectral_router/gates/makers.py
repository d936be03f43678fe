"""Which of a block's alike parts made a tensor of its call. Worked out backwards, and only where it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .nodes import Node, factors_of, places_of

_SUMS = {"sum", "mean", "index_add", "scatter_add", "index_put"}
_GATHERED = {"cat", "stack", "add", "index_add", "index_put", "scatter_add"}  # of several experts, made by all of them

Answer = TypeVar("Answer")


class Makers:
    """`begin`: where the block's call begins; `product`: the gate's; `scoring`: what makes its scores of it, where a product
    with parameters is no expert's; `outputs`: what alike modules gave, with their ids; `stacks`: ids of stacked parameters.
    """

    def __init__(
        self, begin: int, product: Node, scoring: set[Node], outputs: dict[Node, frozenset[int]], stacks: set[int]
    ) -> None:
        self.begin, self.scoring, self.outputs, self.stacks = begin, scoring, outputs, stacks
        self.joined: set[Node] = set()  # scores have met experts there: what comes after is no one expert's
        self._experts: dict[Node, frozenset[int]] = {product: frozenset()}
        self._stacked = {product: False}
        self._behind: dict[Node, set[int]] = {}

    def weighted(self, node: Node) -> bool:
        """Whether this is a product with parameters, other than the gate's."""
        if node in self.scoring or not any(o.static and any(leaf.place for leaf in places_of(o)) for o in node.operands):
            return False
        return bool(factors_of(node))

    def takes(self, node: Node, parameters: set[int]) -> bool:
        """Whether one of these parameters (ids), or what was made of parameters alone, of it too, is among its operands."""
        if not parameters:
            return False
        for operand in node.operands:
            if operand.static:
                if operand not in self._behind:
                    self._behind[operand] = {id(leaf.tensor()) for leaf in places_of(operand)}
                if not parameters.isdisjoint(self._behind[operand]):
                    return True
        return False

    def experts(self, node: Node) -> frozenset[int]:
        """The alike modules (ids) that made it: the one whose output it is, or those of which it was put together."""

        def made(here: Node) -> frozenset[int]:
            makers = [found for operand in here.operands if (found := self._experts[operand])]
            return frozenset().union(*makers) if len(makers) == 1 or here.name in _GATHERED else frozenset()

        def ends(here: Node) -> frozenset[int] | None:
            if here.static or here.number < self.begin:
                return frozenset()
            return self.outputs.get(here, frozenset() if here in self.joined else None)

        return _backwards(node, self._experts, ends, made)

    def stacked(self, node: Node) -> bool:
        """Whether slices of stacked parameters made it."""

        def ends(here: Node) -> bool | None:
            if here.static or here.number < self.begin:
                return False
            if self.takes(here, self.stacks):
                return True
            return False if here.name in _SUMS or self.weighted(here) else None

        def made(here: Node) -> bool:
            return any(self._stacked[operand] for operand in here.operands)

        return bool(self.stacks) and _backwards(node, self._stacked, ends, made)


def _backwards(
    node: Node, known: dict[Node, Answer], ends: Callable[[Node], Answer | None], made: Callable[[Node], Answer]
) -> Answer:
    """What `made` says of a node once its operands are known. Graphs are deeper than Python may recurse."""
    open_ = [node]
    while open_:
        here = open_[-1]
        if here not in known:
            answer = ends(here)
            if answer is None:
                unknown = [operand for operand in here.operands if operand not in known]
                if unknown:
                    open_ += unknown
                    continue
                answer = made(here)
            known[here] = answer
        open_.pop()
    return known[node]
