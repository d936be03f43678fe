"""The judge: what the first real forward computed against what was assumed of each gate; corrects, or says so.

Over 250 lines: one verdict, read from top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .gate import Gate
from .nodes import SCORING, Call, Event, Node, places_of
from .recipe import Recipe, recipe_for
from .scoring import SCORES
from .trace import Trace

_CLOSE = 1e-5


@dataclass
class Verdict:
    """What the forward says of one gate. Neither `gate` nor `message`: nothing against it."""

    gate: Gate | None = None  # a better one
    scores: list[Tensor] | None = None  # its logits (or probabilities), of each call in this forward
    message: str = ""


@dataclass
class Seen:
    """One product of tokens with a gate's matrix, and what became of it."""

    main: Event
    scoring: str | None  # None: of a kind that is not known

    @property
    def width(self) -> int:
        return self.main.width

    def truth(self) -> Tensor | None:
        """Logits (tokens, K) as they were, noise included."""
        held = self.main.logits.held
        return None if held is None else held.detach().movedim(self.main.dim, -1).reshape(-1, self.width).float()


def watched(gates: Sequence[Gate]) -> set[int]:
    """Ids of the parameters whose products tell of these gates: theirs, and what lies beside them."""
    ids: set[int] = set()
    for gate in gates:
        inside = [*gate.module.parameters(), *gate.module.buffers(), *gate.owner.parameters(), gate.matrix]
        if gate.block is not None:
            inside += [*gate.block.parameters(recurse=False)]
        ids |= {id(tensor) for tensor in inside}
    return ids


@torch.no_grad()
def judge(trace: Trace, gate: Gate, read: list[Tensor] | None) -> Verdict:
    """`read`: the probabilities (*, K) that were read of each call of the gate; None: reading failed."""
    if gate.probs is not None or gate.scoring == "product_keys" or trace.failed is not None:
        return Verdict()
    made = isinstance(gate.parameter, str) and not (gate.buffered or isinstance(gate.matrix, nn.Parameter))
    seen = seen_of(trace.events, {id(p) for p in gate.owner.parameters()} if made else {id(gate.matrix)})
    # of tied gates each is judged by its own calls
    seen = [one for one in seen if _within(one, gate.module) or _within(one, gate.block)] or seen
    if not seen:
        return Verdict() if made else _of_another(trace, gate, read)
    if read is not None and _same(gate, seen, read):
        return Verdict()
    return _corrected(trace, gate, seen, read)


def _within(one: Seen, module: nn.Module | None) -> bool:
    call: Call | None = one.main.call
    while call is not None and call.module is not module:
        call = call.outer
    return module is not None and call is not None


def seen_of(events: Iterable[Event], ids: set[int]) -> list[Seen]:
    """The products with one of these parameters whose results are scored or chosen from, in order."""
    products: dict[Node, list[Event]] = {}
    for event in events:
        if any(id(leaf.tensor()) in ids for leaf in places_of(event.static) if leaf.tensor is not None):
            products.setdefault(event.product, []).append(event)
    found = []
    for events in products.values():
        events = [replace(event, logits=all_of(event.logits)) for event in events]
        most = max(_scored(events[0]))
        events = [event for event in events if event.width <= most]
        if not events:
            continue
        width = max(event.width for event in events)
        wide = [event for event in events if event.width == width]
        sure = [event for event in wide if event.kind in SCORING and event.kind != "softplus"]
        scoring = sure or [event for event in wide if event.kind in SCORING]  # a softplus beside is the width of noise
        main = min(scoring or wide, key=lambda event: event.distance)
        if width >= 2:
            # chosen from and never scored: softmax, as what the choice leaves of it
            found.append(Seen(main, SCORING.get(main.kind, "softmax")))
    return found


def _scored(event: Event) -> list[int]:
    """How many scores a token can have of the product: the lengths of its result along the parameters' side."""
    product = event.product
    if product.name in ("mm", "addmm", "bmm", "baddbmm") and len(product.shape) >= 2:
        factors = [value for value in product.args if isinstance(value, Node)][-2:]
        return [product.shape[-1 if factors[-1].static else -2]]
    return list(product.shape) or [1]


def all_of(node: Node) -> Node:
    """The scores over all experts that those of the chosen ones were taken from."""
    while True:
        if node.name in ("topk", "gather", "sort", "masked_fill") and node.args:
            node = node.args[0]
        elif node.name == "scatter" and len(node.args) > 3 and isinstance(node.args[3], Node):
            node = node.args[3]
        else:
            return node


def _same(gate: Gate, seen: list[Seen], read: list[Tensor]) -> bool:
    """Whether what was read is what was computed, up to noise, and up to outputs that score no expert."""
    if not read:
        return False  # it is not called as a module
    had = [tensor.detach().reshape(-1, gate.num_experts).float() for tensor in read]
    told = torch.cat(had)
    for as_it_was in (False, True):
        parts: list[Any] = []
        for one in seen:
            logits = one.truth() if as_it_was and not one.main.noisy else _calm(one)
            if logits is None or one.width < gate.num_experts:
                parts = []
                break
            name = gate.scoring if one.scoring is None else one.scoring
            parts.append([SCORES[name](part) for part in (logits, *_parts(logits, gate))])
        if not parts:
            continue
        for choice in range(3):
            truth = torch.cat([part[choice][:, : gate.num_experts] for part in parts])
            if truth.shape == told.shape and (truth - told).abs().max() <= _tolerance(seen[0]):
                return True
            # one call of the module may score in several parts, or a part of the calls be frozen: as sets of means
    return False


def _parts(logits: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Without what scores no expert of these: shared ones, or none at all, last or first."""
    return logits[:, : gate.num_experts], logits[:, -gate.num_experts :]


def _tolerance(one: Seen) -> float:
    held = one.main.logits.held
    low = [node.held.dtype for node in (one.main.logits, one.main.product) if node.held is not None]
    exact = held is not None and all(dtype in (torch.float32, torch.float64) for dtype in low)
    return _CLOSE if exact else 2e-2


def _calm(one: Seen) -> Tensor | None:
    if not one.main.noisy or one.main.call is None:
        return None
    call: Call | None = one.main.call
    while call is not None:
        found = recipe_for(one.main.logits, one.main.dim, call)
        if found is not None and all(node.held is not None for node in found[1]):
            return found[0].of([node.held for node in found[1]]).reshape(-1, one.width).float()  # type: ignore[misc]
        call = call.outer
    return None


def _of_another(trace: Trace, gate: Gate, read: list[Tensor] | None) -> Verdict:
    """The matrix was in no product that is scored: is another one of the gate's own?"""
    beside = {id(p) for p in gate.module.parameters()} | {id(p) for p in (gate.block or gate.module).parameters(recurse=False)}
    beside |= {id(b) for b in gate.module.buffers()}
    seen = [one for one in seen_of(trace.events, beside) if one.width == gate.num_experts]
    statics = {tuple(id(leaf) for leaf in places_of(one.main.static)) for one in seen}
    leaves = _matrices(seen[0]) if len(statics) == 1 else []
    if len(leaves) != 1 or leaves[0].place is None:
        return _unseen(trace, gate, read)
    holder, name = leaves[0].place
    rows = leaves[0].shape[0] == gate.num_experts
    other = replace(gate, holder=holder, parameter=name, transposed=not rows, adapter=None, assumed=False)
    return _corrected(trace, other, seen, read, f"the matrix {gate.parameter!r} is in no score over experts; {name!r} is")


def _unseen(trace: Trace, gate: Gate, read: list[Tensor] | None) -> Verdict:
    """Of a gate that ran, and whose probabilities are those of no scores: what is read is a guess, and is said to be one."""
    unwatched = trace.watched is not None and id(gate.matrix) not in trace.watched
    another = gate.adapter is not None or type(gate.matrix) not in (Tensor, nn.Parameter)  # it may compute out of sight
    if not read or trace.sharded or unwatched or another:
        return Verdict()
    told = torch.cat([tensor.detach().reshape(-1, gate.num_experts).float() for tensor in read])
    for event in trace.events:
        if event.width == gate.num_experts and event.logits.held is not None:
            scores = Seen(event, None).truth()
            if scores is not None and scores.shape == told.shape and _near(SCORES[gate.scoring](scores), told):
                return Verdict()
    return Verdict(
        message=f"assumed {gate.scoring} ({gate.how}), but nothing was seen that scores, or chooses among, {gate.num_experts} "
        f"products of tokens with {gate.parameter!r}"
    )


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-2)


def _matrices(one: Seen) -> list[Node]:
    return [leaf for leaf in places_of(one.main.static) if len(leaf.shape) >= 2 and one.width in leaf.shape]


def _corrected(trace: Trace, gate: Gate, seen: list[Seen], read: list[Tensor] | None, why: str = "") -> Verdict:
    first = seen[0]
    count, heads = first.width, 1
    if count != gate.num_experts and _numel(first.main.product) == _numel(first.main.logits) and gate.num_experts % count == 0:
        heads = gate.num_experts // count
    found = None if first.scoring is None else source(trace, seen)
    if found is None:
        computed = f"{first.scoring or first.main.kind} of what a product with {_named(first)} becomes"
        assumed = f"{gate.scoring} ({gate.how})"
        if read is None or not read:
            return Verdict(message=f"cannot be read: assumed {assumed}, seen {computed}")
        return Verdict(message=f"assumed {assumed}, seen {computed}; the probabilities that are read differ")
    recipe, module, scores = found
    better = replace(
        gate,
        module=module,
        holder=gate.holder or gate.module,
        num_experts=count,
        heads=heads,
        scoring=first.scoring or gate.scoring,
        reads="logits",
        position=None,
        assumed=False,
        recipe=recipe,
    )
    better.index = gate.index if len(seen) == 1 or gate.index is None else None
    return Verdict(better, scores, why)


def source(trace: Trace, seen: list[Seen]) -> tuple[Recipe, nn.Module, list[Tensor]] | None:
    """The module whose calls give these logits by the shortest recipe, one call for each, verified; and the logits."""
    options = []
    cone = _cone(seen[0].main.logits)
    for call in trace.calls:
        if cone.isdisjoint(call.places):
            continue
        found = recipe_for(seen[0].main.logits, seen[0].main.dim, call)
        if found is not None:
            recipe, _ = found
            work = len(recipe.steps) + (0 if all(s[0] == "output" for s in recipe.sources if isinstance(s, tuple)) else 3)
            options.append((work, -len(call.name), call, recipe))
    for _, _, call, recipe in sorted(options, key=lambda option: option[:2]):
        calls = [other for other in trace.calls if other.module is call.module]
        if len(calls) != len(seen):
            seen = _different(seen)
        if len(calls) != len(seen):
            continue
        scores = []
        for one, other in zip(seen, calls, strict=True):
            found = recipe_for(one.main.logits, one.main.dim, other)
            if found is None or (found[0].sources[:1] != recipe.sources[:1] and isinstance(recipe.sources[0], tuple)):
                break
            values = [node.held for node in found[1]]
            if any(value is None for value in values) or not _holds(found[0], values, one):  # type: ignore[arg-type]
                break
            with torch.set_grad_enabled(other.graph):
                scores.append(found[0].of(values))  # type: ignore[arg-type]
        else:
            return recipe, call.module, scores
    return None


def _different(seen: list[Seen]) -> list[Seen]:
    """Without scores that are computed twice, as for the choice and for its weight."""
    kept: list[Seen] = []
    for one in seen:
        truth = one.truth()
        if truth is None or not any(
            (other := before.truth()) is not None and other.shape == truth.shape and torch.equal(other, truth)
            for before in kept
        ):
            kept.append(one)
    return kept


def _cone(node: Node) -> set[Node]:
    """What a recipe for this could begin with."""
    edge, seen = [node], {node}
    while edge and len(seen) < 512:
        for operand in edge.pop(0).operands:
            if operand not in seen and not operand.static:
                seen.add(operand)
                edge.append(operand)
    return seen


def _holds(recipe: Recipe, values: list[Tensor], one: Seen) -> bool:
    """Whether the recipe gives what was seen, and the same again for another number of tokens."""
    try:
        whole = recipe.of(values)
        truth = one.main.logits.held
        if truth is None:
            return False
        truth = truth.movedim(one.main.dim, -1)
        if not one.main.noisy and not _close(whole, truth, _tolerance(one)):
            return False
        length = values[0].shape[0] if values[0].ndim > 1 else 1
        if length < 2 or any(value.ndim < 2 or value.shape[0] != length for value in values):
            return True
        tokens = whole.reshape(-1, whole.shape[-1])
        if recipe.over_batch:  # the same for twice the tokens, whose mean and variance are the same
            other = recipe.of([torch.cat([value, value]) for value in values])
            expected = torch.cat([tokens, tokens])
        else:
            other, expected = recipe.of([value[: length // 2] for value in values]), tokens
        other = other.reshape(-1, other.shape[-1])
        return len(other) not in (0, len(tokens)) and _close(other, expected[: len(other)], _tolerance(one))
    except Exception:  # whatever an operation says of tensors of another size
        return False


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    finite = b.isfinite()
    scale = b[finite].abs().max().clamp_min(1).item() if finite.any() else 1.0
    return torch.allclose(a[finite].float(), b[finite].float(), rtol=0, atol=tolerance * scale)


def _numel(node: Node) -> int:
    total = 1
    for length in node.shape:
        total *= length
    return total


def _named(one: Seen) -> str:
    names = [leaf.place[1] for leaf in places_of(one.main.static) if leaf.place is not None]
    return " and ".join(repr(name) for name in names) or "a constant"


def line_for(gate: Gate) -> str:
    """The line that a user writes to read the gate by a function of their own."""
    parameter: Any = gate.parameter
    return (
        f"gates=Gate({gate.name!r}, module, {gate.num_experts}, {parameter!r}, probs=function), with "
        "function(module, args, kwargs, output) -> probabilities (tokens, experts)"
    )
