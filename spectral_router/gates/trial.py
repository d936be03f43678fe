"""How the probabilities of a gate are read: seen by trying a copy of it on random tokens, else taken from its source."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .gate import Gate, Reads
from .harmless import touches_nothing
from .scoring import RAW_SCORES, SCORES, named_scoring, source_of

_TOKENS = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def observe(gate: Gate, block: nn.Module | None, settled: dict[Any, _Reading]) -> Gate:
    """Settle what is hooked, what is read there, and the scoring of a gate whose matrix is known.

    `settled` holds what was seen of gates alike, so that a model of 60 layers costs one trial.
    """
    assert isinstance(gate.parameter, str)
    scorer_path = gate.parameter.rpartition(".")[0]
    scorer = gate.module.get_submodule(scorer_path)
    # a plain linear layer hands out its logits, if it is called
    plain = type(scorer).forward is nn.Linear.forward
    gate.scoring = named_scoring([gate.module, scorer, block])
    if gate.num_experts == 2 * getattr(block, "num_keys", -1):
        gate.scoring = "product_keys"
    if not scorer_path and plain:
        gate.reads = "logits"
        return gate
    if block is None:
        return gate  # the parameter of a block: its output is tokens
    key = _likeness(gate)
    if key not in settled:
        trial = _try(gate, scorer_path if plain else None)
        if trial is None:
            called = plain and f"{scorer_path}.weight" not in source_of(gate.module)
        else:
            called = trial.called
            _judge(gate, trial)
        settled[key] = _Reading(gate.num_experts, gate.scoring, gate.reads, gate.position, gate.assumed, called)
    gate.num_experts, gate.scoring, gate.reads, gate.position, gate.assumed, called = settled[key]
    if called and gate.reads == "input":
        gate.name, gate.module = f"{gate.name}.{scorer_path}".lstrip("."), scorer
        assert isinstance(gate.parameter, str)
        gate.parameter, gate.reads, gate.position = gate.parameter.rpartition(".")[2], "logits", None
    return gate


class _Reading(NamedTuple):
    num_experts: int
    scoring: str
    reads: Reads
    position: int | str | None
    assumed: bool
    called: bool  # the layer that holds the matrix is run as a module


def _likeness(gate: Gate) -> tuple[Any, ...]:
    """Equal for gates that differ in the values of their tensors only."""
    plain = (int, float, str, bool, type(None))
    parts = [
        (path, type(module), *((k, v) for k, v in vars(module).items() if isinstance(v, plain) and "layer" not in k))
        for path, module in gate.module.named_modules()
    ]
    shapes = [(name, tensor.shape) for name, tensor in (*gate.module.named_parameters(), *gate.module.named_buffers())]
    return gate.parameter, gate.index is None, gate.num_experts, gate.transposed, gate.scoring, *parts, *shapes


class _Trial:
    """What a copy of a gate gave for random tokens."""

    def __init__(self, outputs: list[tuple[int | str | None, Tensor]], base: Tensor | None, called: bool) -> None:
        self.outputs, self.base, self.called = outputs, base, called

    def dense(self, *widths: int) -> Iterator[tuple[int | str | None, Tensor]]:
        for position, tensor in self.outputs:
            if tensor.is_floating_point() and tensor.shape[-1] in widths and tensor.numel() == _TOKENS * tensor.shape[-1]:
                yield position, tensor.reshape(_TOKENS, -1)


def _try(gate: Gate, scorer_path: str | None) -> _Trial | None:
    """Run a copy of the gate's module; None where that is not possible."""
    router = gate.module
    # no hook of anyone is copied or fires; parameters that have no values here (meta, sharded) become ones
    memo: dict[int, Any] = {id(getattr(module, hooks)): OrderedDict() for module in router.modules() for hooks in _HOOKS}
    generator = torch.Generator().manual_seed(0)
    matrix = gate.matrix
    if not isinstance(matrix, nn.Parameter):  # computed from others: a copy could not be given values
        return None
    if not touches_nothing(router):  # a global list of losses, say: its forward is for real tokens only
        return None
    # what the matrix scores may be a projection of the tokens
    widths = [gate.dim, *(module.in_features for module in router.modules() if isinstance(module, nn.Linear))]
    # of a size that shows soft caps and tells sigmoid from softmax
    scored = torch.randn(matrix.shape, generator=generator) * 2 * gate.dim**-0.5
    for tensor in (*router.parameters(), *router.buffers()):
        memo[id(tensor)] = scored if tensor is matrix else _plain(tensor)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=False)
    try:
        twin = copy.deepcopy(router, memo).eval()
        seen: list[Tensor] = []
        if scorer_path is not None:
            twin.get_submodule(scorer_path).register_forward_hook(lambda _module, _args, output: seen.append(output))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            for width in widths:
                tokens = torch.randn(_TOKENS, width, generator=generator)
                outputs = _call(twin, tokens, gate.num_experts)
                if outputs is not None:
                    break
    except Exception:  # a foreign module that cannot be copied
        return None
    if outputs is None:
        return None
    base: Tensor | None = seen[-1].reshape(_TOKENS, -1) if seen else None
    if base is None and gate.index is None and width == gate.dim:
        original, gate.module = gate.module, twin
        base = gate.logits(tokens)
        gate.module = original
    return _Trial(outputs, base, called=bool(seen))


def _call(router: nn.Module, tokens: Tensor, num_experts: int) -> list[tuple[int | str | None, Tensor]] | None:
    """Run with what the signature asks for besides tokens, on a flat and on a batched layout; None if neither will do."""
    extra: list[Any] = []
    for parameter in list(inspect.signature(router.forward).parameters.values())[1:]:
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            extra.append(torch.zeros(num_experts) if "bias" in parameter.name else None)
    for layout in (tokens, tokens[None]):  # some gates only take (batch, tokens, dim)
        try:
            output = router(layout, *extra)
            break
        except Exception:  # whatever a foreign module may raise: then its source decides
            continue
    else:
        return None
    if isinstance(output, Tensor):
        return [(None, output)]
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return [(position, value) for position, value in items if isinstance(value, Tensor) and value.ndim]


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.numel() == 0:
        return torch.ones(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _judge(gate: Gate, trial: _Trial) -> None:
    """Which output holds logits or probabilities; where none does, the reading stays with the scorer or the input."""
    base = trial.base
    width = gate.num_experts
    for position, tensor in trial.dense(*range(max(2, width - 4), width + 1)):
        if base is not None and _close(tensor, base[:, : tensor.shape[1]]) and not (tensor.shape[1] < width and trial.called):
            gate.num_experts = tensor.shape[1]
            if not trial.called:
                gate.reads, gate.position = "logits", position
            return _judge_scoring(gate, trial, base)
    dense = list(trial.dense(width))
    for name, score in RAW_SCORES.items():
        if base is not None and any(_close(t, score(base)) or _close(t, SCORES[name](base)) for _, t in dense):
            gate.scoring = name
            return None
    full = [(position, t) for position, t in dense if (t != 0).float().mean() > 0.9]
    for position, tensor in full:
        if not _stochastic(tensor) and (tensor < 0).any():
            gate.reads, gate.position = "logits", position
            return _judge_scoring(gate, trial, tensor)
    for position, tensor in full:
        if _stochastic(tensor):
            gate.reads, gate.position = "probs", position
            return None
    return _judge_scoring(gate, trial, base)


def _judge_scoring(gate: Gate, trial: _Trial, logits: Tensor | None) -> None:
    """Combine weights handed out, (tokens, k) with indices or sparse (tokens, experts), are scores up to a factor a token."""
    if logits is None:
        return
    rows = [tensor.reshape(_TOKENS, -1) for _, tensor in trial.outputs if tensor.numel() % _TOKENS == 0]
    chosen = [
        t for t in rows if not t.is_floating_point() and t.dtype != torch.bool and 0 <= t.min() <= t.max() < logits.shape[1]
    ]
    for weights in rows:
        if not weights.is_floating_point():
            continue
        places = [indices for indices in chosen if indices.shape == weights.shape]
        if weights.shape == logits.shape and (weights == 0).any():
            weights, indices = weights.topk(int((weights != 0).sum(-1).min().clamp_min(1)))
            places = [indices]
        for place in places:
            fits = [name for name, score in RAW_SCORES.items() if _proportional(weights, score(logits).gather(1, place))]
            gate.assumed = len(fits) != 1
            if len(fits) == 1:
                gate.scoring = fits[0]
                return


def _proportional(weights: Tensor, scores: Tensor) -> bool:
    """One factor for each token; with one weight a token, one factor for all."""
    ratio = weights / scores
    span = ratio.amax(-1) - ratio.amin(-1) if ratio.shape[-1] > 1 else ratio.amax(0) - ratio.amin(0)
    return bool((span <= 1e-3 * ratio.abs().amax()).all())


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def _stochastic(tensor: Tensor) -> bool:
    return bool((tensor >= 0).all()) and torch.allclose(tensor.float().sum(-1), torch.ones(len(tensor)), atol=1e-3)
