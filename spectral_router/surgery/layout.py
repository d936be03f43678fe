"""What only a run on a few random tokens shows: which way experts lie in flat matrices, and how many a token takes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..gates.gate import Gate
from .part import Part

_TOKENS = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def flat_layout(gate: Gate, block: nn.Module, matrices: list[nn.Parameter]) -> list[tuple[nn.Parameter, int, int]]:
    """For each matrix that holds all experts side by side: the dimension along which it does, and the length of one expert.

    Cut the right way, a token's output depends on the stretches of its own experts only; cut the other way, on all of them.

    Raises:
        ValueError: every token depends on every stretch, or the block cannot be run: the experts cannot be told apart.
    """
    ways = {id(m): [d for d in range(m.ndim) if m.shape[d] % gate.num_experts == 0] for m in matrices}
    matrices = [matrix for matrix in matrices if ways[id(matrix)] and matrix.is_floating_point()]
    if not matrices:
        return []
    slopes = slopes_of_tokens(gate, block, matrices)
    found = []
    for number, matrix in enumerate(matrices):
        counts = {
            dim: sum(_touched(of_token[number], dim, gate.num_experts) for of_token in slopes) for dim in ways[id(matrix)]
        }
        best = min(counts, key=lambda dim: counts[dim])
        rivals = [dim for dim, count in counts.items() if count == counts[best]]
        if not 0 < counts[best] < len(slopes) * gate.num_experts or len(rivals) > 1:
            why = "every token depends on all of it" if slopes else f"{type(block).__name__} could not be run"
            raise ValueError(
                f"the experts of the gate {gate.name!r} lie side by side in matrices such as {tuple(matrix.shape)}, and cannot "
                f"be told apart: {why}; keep them in a ModuleList, or in parameters (experts, ...)"
            )
        found.append((matrix, best, matrix.shape[best] // gate.num_experts))
    return found


def _touched(slope: Tensor | None, dim: int, experts: int) -> int:
    """On how many stretches a token depends."""
    if slope is None:
        return 0
    return int((slope.unflatten(dim, (experts, -1)).movedim(dim, 0).flatten(1) != 0).any(1).sum())


def seen_top_k(gate: Gate, block: nn.Module, experts: list[list[Part]]) -> int | None:
    """On how many experts a token's output depends, where no attribute says it; None if on all, or if that is not seen."""
    leaves = list({id(part.parameter): part.parameter for parts in experts for part in parts}.values())
    place = {id(leaf): number for number, leaf in enumerate(leaves)}
    if not all(leaf.is_floating_point() for leaf in leaves):
        return None
    most = 0
    for slopes in slopes_of_tokens(gate, block, leaves):
        count = 0
        for parts in experts:
            of_expert = [(slopes[place[id(part.parameter)]], part.index) for part in parts]
            count += any(slope is not None and bool((slope[index or ()] != 0).any()) for slope, index in of_expert)
        most = max(most, count)
    return most if 0 < most < len(experts) else None


@torch.enable_grad()
def slopes_of_tokens(gate: Gate, block: nn.Module, leaves: list[nn.Parameter]) -> list[tuple[Tensor | None, ...]]:
    """For each of a few random tokens, the gradients of its output; empty where the block cannot be run.

    A copy of the block without hooks runs, on the parameters' own memory.
    """
    memo: dict[int, Any] = {id(getattr(module, hooks)): OrderedDict() for module in block.modules() for hooks in _HOOKS}
    for parameter in block.parameters():
        if parameter.is_meta or type(parameter.data) is not Tensor:
            return []
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.is_floating_point())
    try:
        twin = copy.deepcopy(block, memo).eval()
        output = _run(twin, _widths(gate, block), leaves[0])
    except Exception:  # whatever a foreign module may raise
        return []
    if output is None:
        return []
    twins = [memo[id(leaf)] for leaf in leaves]
    direction = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(1)).to(output)
    return [torch.autograd.grad((token * direction).sum(), twins, retain_graph=True, allow_unused=True) for token in output]


def _run(block: nn.Module, widths: list[int], like: Tensor) -> Tensor | None:
    """The block's output for random tokens, (tokens, *)."""
    with torch.random.fork_rng(devices=[]):
        for width in widths:
            tokens = torch.randn(_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(like)
            for layout in (tokens[None], tokens):
                try:
                    output = block(layout)
                except Exception:  # some blocks only take (batch, tokens, dim), some only (tokens, dim)
                    continue
                values = output.values() if isinstance(output, Mapping) else output
                for value in [values] if isinstance(values, Tensor) else values:
                    if isinstance(value, Tensor) and value.requires_grad and value.numel() % _TOKENS == 0:
                        return value.reshape(_TOKENS, -1)
    return None


def _widths(gate: Gate, block: nn.Module) -> list[int]:
    """How long a token may be. What the gate's matrix scores may be a projection of it, by a layer of the router."""
    router = [child for child in block.children() if any(module is gate.module for module in child.modules())]
    before, anywhere = (
        [part.in_features for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
        for modules in (router, [block])
    )
    return list(dict.fromkeys([*before, gate.dim, *anywhere]))
