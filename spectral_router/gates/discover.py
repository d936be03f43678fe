"""Gates under any name: found in what one forward computes, with nothing assumed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .evidence import beside_experts, counts_in
from .experts import Parts, alike, pairs
from .gate import Gate
from .judge import Seen, judge, line_for, seen_of, source
from .nodes import CHOOSING, Event, Node, places_of, product_before
from .trace import Trace


def observed_gates(model: nn.Module, gates: list[Gate], example: Any) -> list[Gate]:
    """The gates as one forward on a batch shows them, then those that no name told of.

    Warns:
        UserWarning: a gate is not what was assumed, and cannot be read by what was seen.
    """
    trace = observe_forward(model, example, gates)
    kept, said = confirmed(trace, [gate for gate in gates if not _refuted(trace, gate)])
    more = discovered(trace, model, kept)
    for message in said + more.told:
        warnings.warn(message, stacklevel=4)
    return kept + more.gates


def _refuted(trace: Trace, gate: Gate) -> bool:
    """Whether only a name and a list of as many modules spoke for it, and its scores have nothing to do with these."""
    block = gate.block
    if block is None or beside_experts(block) or counts_in(block) or counts_in(gate.module):
        return False
    seen = seen_of(trace.events, {id(gate.matrix)})
    return bool(seen) and _weighs_alike(trace, seen[0], {}) is None


def observe_forward(model: nn.Module, example: Any, gates: list[Gate]) -> Trace:
    """Watch one forward, without gradients, in the model's mode. Buffers and the random state stay as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    trace = Trace(model, kept={id(gate.module) for gate in gates})
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), trace:
            model(*args, **kwargs)
    finally:
        trace.remove_hooks()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return trace


def confirmed(trace: Trace, gates: list[Gate]) -> tuple[list[Gate], list[str]]:
    """The gates as the forward shows them, and what is to be said of those that it contradicts."""
    kept, said = [], []
    for gate in gates:
        read: list[Tensor] | None
        try:
            read = [gate.read(*call) for call in trace.kept.get(id(gate.module), [])]
        except Exception:  # of whatever the gate's module was not expected to hand out
            read = None
        verdict = judge(trace, gate, read)
        if verdict.message and verdict.gate is None:
            said.append(f"gate {gate.name}: {verdict.message}; write {line_for(gate)}")
        kept.append(verdict.gate or gate)
    return kept, said


class Discovered(NamedTuple):
    gates: list[Gate]
    told: list[str]  # of scores that cannot be read again


def discovered(trace: Trace, model: nn.Module, known: list[Gate]) -> Discovered:
    """Gates that no name told of: scores of tokens over K alternatives, which weigh or choose K alike parts of the model."""
    paths = {id(module): name for name, module in model.named_modules()}
    found = Discovered([], [])
    for seen, block in _scores_of_parts(trace, trace.events, known):
        gate = None if block is None else _gate_of(trace, seen, block, paths)
        if gate is not None:
            found.gates.append(gate)
        else:
            count = seen[0].width
            why = "keys whose pairs are the experts (product keys), so" if block is None else "experts, but"
            found.told.append(
                f"{_named(seen, paths)} scores {count} {why} the scores cannot be had again from what a module is given or "
                f"gives; write gates=Gate(name, module, {count}, parameter, probs=function), with "
                "function(module, args, kwargs, output) -> probabilities (tokens, experts)"
            )
    return found


def _named(seen: list[Seen], paths: dict[int, str]) -> str:
    holder, name = next(leaf.place for leaf in places_of(seen[0].main.static) if leaf.place is not None)
    return f"{paths.get(id(holder), '')}.{name}".lstrip(".")


def missed(trace: Trace, model: nn.Module, known: list[Gate]) -> list[str]:
    """The same by name only, for a forward whose other values were not kept."""
    paths = {id(module): name for name, module in model.named_modules()}
    scores = _scores_of_parts(trace, trace.others, known)
    return [f"{_named(seen, paths)} ({seen[0].width} experts)" for seen, _ in scores]


def _scores_of_parts(trace: Trace, events: list[Event], known: list[Gate]) -> Iterator[tuple[list[Seen], nn.Module | None]]:
    taken = {id(gate.matrix) for gate in known}
    done: set[tuple[int, ...]] = set()
    widths = _widths_of_noise(trace)
    parts: dict[int, Parts] = {}
    for event in events:
        tensors = [leaf.tensor() for leaf in places_of(event.static) if leaf.tensor() is not None]
        leaves = tuple(map(id, tensors))
        if leaves in done or taken & set(leaves):
            continue
        done.add(leaves)
        if any(tensor.ndim > 1 and not tensor.is_floating_point() for tensor in tensors):
            continue  # quantised: no numbers to penalise
        seen = [one for one in seen_of(events, set(leaves)) if one.main.static is event.static or one.width == event.width]
        if not seen or seen[0].scoring is None or seen[0].main.product in widths:
            continue
        if any(event.kind == "topk" and pairs(trace, event.product) for event in events if event.static is seen[0].main.static):
            yield seen, None
            continue
        blocks = (_weighs_alike(trace, one, parts) for one in seen)  # some choose, others weigh
        if (block := next((block for block in blocks if block is not None), None)) is not None:
            yield seen, block


def _widths_of_noise(trace: Trace) -> set[Node]:
    """Products that random numbers are multiplied by: they say how much noise there is, and score nothing."""
    found = set()
    for node in trace.order:
        if node.name == "mul" and any(operand.pure for operand in node.operands):
            for operand in node.operands:
                if not operand.pure and not operand.static and (behind := product_before(operand)) is not None:
                    found.add(behind[0])
    return found


def _gate_of(trace: Trace, seen: list[Seen], block: nn.Module, paths: dict[int, str]) -> Gate | None:
    one = seen[0]
    leaves = [leaf for leaf in places_of(one.main.static) if leaf.place is not None]
    flat = [leaf for leaf in leaves if len(leaf.shape) >= 2]
    vectors = [leaf for leaf in leaves if len(leaf.shape) == 1]
    if len(flat) >= 1:
        flat.sort(key=lambda leaf: one.width not in leaf.shape)
        holder, name = flat[0].place  # type: ignore[misc]
        parameter: Any = name
        rows, columns = flat[0].shape[0], flat[0].shape[-1]
    elif len(vectors) == one.width:
        holder, parameter = block, tuple(f"{_below(block, leaf.place[0])}{leaf.place[1]}" for leaf in vectors)  # type: ignore[index]
        rows, columns = one.width, vectors[0].shape[0]
    else:
        return None
    found = source(trace, seen)
    if found is None:
        return None
    recipe, module, _ = found
    count = _chosen_among(trace, one)
    if count is None:
        return None
    heads = rows // one.width if rows != one.width and rows % one.width == 0 and columns != one.width else 1
    path = paths.get(id(holder), "")
    name = path if isinstance(holder, nn.Linear) else f"{path}.{parameter if isinstance(parameter, str) else parameter[0]}"
    gate = Gate(
        name.lstrip("."), module, count, parameter, one.scoring or "softmax", reads="logits", recipe=recipe, holder=holder,
        block=block, heads=heads, transposed=rows != one.width and columns == one.width and heads == 1,
    )  # fmt: skip
    if module is holder and isinstance(holder, nn.Linear) and not recipe.steps:
        gate.recipe, gate.holder = None, None  # its own output, as of any linear gate
    return gate


def _chosen_among(trace: Trace, one: Seen) -> int | None:
    """How many of the scores a choice is made among: not among those of shared experts, which come last; None: elsewhere."""
    for event in trace.events:
        if event.product is one.main.product and event.kind in CHOOSING and one.width - 2 <= event.width < one.width:
            node = event.logits
            for _ in range(8):
                if node.name == "slice" and node.shape[-1] < node.args[0].shape[-1]:
                    return event.width if node.args[2] == 0 else None
                inward = [operand for operand in node.operands if not operand.static]
                if len(inward) != 1:
                    break
                node = inward[0]
    return one.width


def _below(block: nn.Module, module: nn.Module) -> str:
    path = next((name for name, child in block.named_modules() if child is module), "")
    return f"{path}." if path else ""


def _weighs_alike(trace: Trace, one: Seen, parts: dict[int, Parts]) -> nn.Module | None:
    """The module whose K alike parts, modules or slices of stacked parameters, the scores weigh or choose, if any."""
    call = one.main.call
    for _ in range(4):
        if call is None:
            return None
        if alike(trace, call, parts.setdefault(id(call.module), Parts(call.module)), one):
            return call.module
        call = call.outer
    return None
