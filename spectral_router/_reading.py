"""How the probabilities of a gate are read: seen by trying a copy of it on random tokens, else taken from its source."""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .gates import Gate

_TOKENS = 16
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _normalised(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def probs(logits: Tensor) -> Tensor:
        scores = score(logits)
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

    return probs


_RAW: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def _product_keys(logits: Tensor) -> Tensor:
    """Doge cuts its logits in two along the flattened batch, as is done here, and scores row keys and column keys apart."""
    rows, columns = logits.reshape(2, -1, logits.shape[-1] // 2).softmax(-1)
    return torch.cat([rows, columns], -1) / 2


# logits (*, K) -> probs (*, K), by the name of the scoring
SCORES = {name: score if name == "softmax" else _normalised(score) for name, score in _RAW.items()}
SCORES["product_keys"] = _product_keys


def first_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first floating-point tensor of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError("a gate's input must hold a floating-point tensor of tokens; pass Gate objects with a `probs` function")


def pick(output: Any, position: int | str | None) -> Tensor:
    if position is None:
        return output
    if isinstance(position, str) and not isinstance(output, Mapping):
        return getattr(output, position)
    return output[position]


def with_adapters(weight: Tensor, adapter: nn.Module) -> Tensor:
    """W + BA of each active adapter of a PEFT layer."""
    if adapter.merged or adapter.disable_adapters:
        return weight
    for name in adapter.active_adapters:
        if name in adapter.lora_A:
            weight = weight + adapter.get_delta_weight(name)
    return weight


def observe(gate: Gate, block: nn.Module | None) -> Gate:
    """Settle what is hooked, what is read there, and the scoring of a gate whose matrix is known."""
    scorer_path = gate.parameter.rpartition(".")[0]
    scorer = gate.module.get_submodule(scorer_path)
    # a plain linear layer hands out its logits, if it is called; PEFT's layer around one does too
    plain = type(scorer).forward is nn.Linear.forward
    gate.scoring = _named_scoring([gate.module, scorer, block]) or "softmax"
    if gate.num_experts == 2 * getattr(block, "num_keys", -1):
        gate.scoring = "product_keys"
    if not scorer_path and plain:
        gate.reads = "logits"
        return gate
    if block is None:
        return gate  # the parameter of a block: its output is tokens
    trial = _try(gate, scorer_path if plain else None)
    if trial is None:
        called = plain and f"{scorer_path}.weight" not in _source(gate.module)
    else:
        called = trial.called
        _judge(gate, trial)
    if called and gate.reads == "input":
        gate.name, gate.module = f"{gate.name}.{scorer_path}".lstrip("."), scorer
        gate.parameter, gate.reads, gate.position = gate.parameter.rpartition(".")[2], "logits", None
    return gate


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
    matrix = router.get_parameter(gate.parameter)
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
    for name, score in _RAW.items():
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
    chosen = [t for t in rows if not t.is_floating_point() and t.dtype != torch.bool and 0 <= t.min() <= t.max() < logits.shape[1]]
    for weights in rows:
        if not weights.is_floating_point():
            continue
        places = [indices for indices in chosen if indices.shape == weights.shape]
        if weights.shape == logits.shape and (weights == 0).any():
            weights, indices = weights.topk(int((weights != 0).sum(-1).min().clamp_min(1)))
            places = [indices]
        for place in places:
            fits = [name for name, score in _RAW.items() if _proportional(weights, score(logits).gather(1, place))]
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


def _named_scoring(modules: list[nn.Module | None]) -> str | None:
    """Scoring as attributes name it, as in `score_func="sigmoid"`, else as the source of the nearest class applies it."""
    present = [module for module in modules if module is not None]
    for module in present:
        for source in (module, vars(module).get("config"), vars(module).get("args")):
            for key, value in {**getattr(source, "__dict__", {}), **getattr(source, "_modules", {})}.items():
                if re.search(r"scor|gating_f|gate_f|router_act", key) and (isinstance(value, (str, nn.Module)) or callable(value)):
                    said = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
                    for name in ("sqrtsoftplus", "sigmoid", "softmax"):
                        if name in said.lower().replace("_", ""):
                            return name
    for module in present:
        said = _source(module)
        named = [name for name in ("sigmoid", "softmax") if re.search(rf"{name}\w*\(", said)]
        if len(named) == 1:
            return named[0]
    return None


def multiplied_from_left(owner: nn.Module, name: str) -> bool:
    """Whether a square matrix is (dim, experts), as in x @ W; by the source, else by the name."""
    if found := re.search(rf"@ *self\.{name}\b(\.m?T\b|\.t\()?|linear\([^()]*self\.{name}\b", _source(owner)):
        return found[0].startswith("@") and not found[1]
    return name.startswith(("w_", "sim_"))


def _source(module: nn.Module) -> str:
    """The source of the module's class and of those it is made from, up to torch's own."""
    text = ""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn."):
            break
        try:
            text += inspect.getsource(kind)
        except (OSError, TypeError):  # defined where there is no file
            continue
    return text
