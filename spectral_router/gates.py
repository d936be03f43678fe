"""Gates: which modules of a model route tokens to experts, where their matrices are, how their probabilities are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ._reading import SCORES, first_tokens, multiplied_from_left, observe, pick, with_adapters

__all__ = ["Gate", "find_gates"]

Reads = Literal["logits", "probs", "input"]

# A gate is called one of these words, alone or with the company listed; `gate_proj`, `output_gate` and
# `per_layer_input_gate` are the gates of something else.
_GATE_NAME = re.compile(
    r"(?:(?:moe|experts?|tokens?|top_?k|noisy|sparse|mlp|ffn|base)_?)*"
    r"(?:gates?|gating|routers?|routing|wg|w_g|w_gate|w_gating|w_router|switch)"
    r"(?:_(?:gate|network|net|layer|linear|module|fn|weights?|matrix|logits))*"
)
_GATE_CLASS = re.compile(r"router|gating|(?:top_?k|top\d|moe|naive|noisy|switch|gshard|cosine|expert|token).*gate", re.I)
# inside a router: not what scores the experts
_NOT_SCORING = re.compile(r"noise|bias|norm|scale|statics|lora_|temperature|_inv_")
_NOT_A_COUNT = re.compile(r"_per|top|shared|capacity|size|dim|hidden|group|parallel|rank|idx|index|_id|layer|step|freq|dense")


@dataclass(eq=False, repr=False)
class Gate:
    """One router gate of a model: its matrix, live, and how the probabilities over its experts are read.

    Args:
        name: path, in the model, of the module that is hooked; for a matrix inside a stack, with `[i]` at its end.
        module: that module.
        num_experts: K, the number of experts that it scores.
        parameter: path of the matrix inside the module, such as "weight", "layer.weight" or "w_gate". Its rows score the
            experts (rows beyond the K-th are for something else and left out); see `transposed`. A flat parameter of
            K x dim entries is viewed as rows.
        scoring: what makes probabilities of logits: "softmax", or "sigmoid" and "sqrtsoftplus", which are then normalised to
            sum to one for each token; or "product_keys", Doge's: two softmaxes, over keys whose pairs are the experts, halved.
        transposed: the matrix is (dim, experts).
        index: the matrix is entry `index` of a stack (experts outside, dim, experts inside), as in hierarchical MoEs.
        reads: "logits": the module's output, or its entry at `position`, holds logits over all experts; "probs": it holds
            probabilities; "input": neither, so the logits are computed again from the module's input, W x + b.
        position: index, key or attribute name of that entry; None for the output itself.
        probs: your own reading instead: called with the module's input and its output, returns the
            probabilities `(tokens, experts)`.
        adapter: the PEFT layer that adapts the matrix, if there is one.
    """

    name: str
    module: nn.Module
    num_experts: int
    parameter: str = "weight"
    scoring: str = "softmax"
    transposed: bool = False
    index: int | None = None
    reads: Reads = "logits"
    position: int | str | None = None
    probs: Callable[[Tensor, Any], Tensor] | None = None
    adapter: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORES:
            raise ValueError(f"scoring must be one of {', '.join(SCORES)}, got scoring={self.scoring!r}")
        if self.reads not in ("logits", "probs", "input"):
            raise ValueError(f'reads must be "logits", "probs" or "input", got reads={self.reads!r}')

    @property
    def weight(self) -> Tensor:
        """W, live, `(experts, dim)`: a view of the parameter, or, under LoRA, the effective weight W + BA."""
        owner = self.owner
        weight: Tensor = getattr(owner, self.parameter.rpartition(".")[2])
        # during a forward a parametrization may have added BA already
        if self.adapter is not None and not hasattr(owner, "parametrizations"):
            weight = with_adapters(weight, self.adapter)
        if self.index is not None:
            weight = weight[self.index]
        if weight.ndim == 1:
            weight = rearrange(weight, "(k d) -> k d", k=self.num_experts)
        weight = weight.mT if self.transposed else weight
        return weight if len(weight) == self.num_experts else weight[: self.num_experts]

    @property
    def owner(self) -> nn.Module:
        """The module whose attribute the matrix is."""
        path = self.parameter.rpartition(".")[0]
        return self.module.get_submodule(path)

    @property
    def dim(self) -> int:
        """D, the length of the vectors that the matrix scores."""
        return self.weight.shape[-1]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Probabilities `(*, K)` over all experts, in float32 or better, from one call of the module."""
        if self.probs is not None:
            return self.probs(first_tokens(args, kwargs), output)
        if self.reads == "input":
            tokens = first_tokens(args, kwargs)
            tokens = tokens if self.index is None else tokens[self.index]
            with torch.autocast(tokens.device.type, enabled=False):
                scores = self.logits(tokens)
        else:
            scores = pick(output, self.position)[..., : self.num_experts]
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores if self.reads == "probs" else SCORES[self.scoring](scores)

    def logits(self, tokens: Tensor) -> Tensor:
        """W x + b for tokens `(*, D)`, in float32 or better."""
        weight, bias = self.weight, getattr(self.owner, "bias", None)
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, weight.dtype), torch.float32)
        if not isinstance(bias, Tensor) or bias.shape != (self.num_experts,):
            bias = None
        return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def __repr__(self) -> str:
        return f"Gate({self.name!r}, {self.num_experts} experts x {self.dim}, {self.scoring}, {self.how})"

    @property
    def how(self) -> str:
        """How the probabilities are read, in a few words."""
        if self.probs is not None:
            return "own function"
        place = "output" if self.position is None else f"output[{self.position!r}]"
        return {"input": "W x + b of its input", "logits": f"{place}: logits", "probs": f"{place}: probs"}[self.reads]


def find_gates(model: nn.Module) -> list[Gate]:
    """The router gates of a model, found by structure; an empty list if it has none.

    A gate is a module (or a raw parameter) called gate, router, gating, w_g, switch or the like, or of a class called so, next
    to experts or with a count of experts of its own, that holds a matrix with one row (or column) for each expert. A copy of
    each is then tried on 16 random tokens, to see which of its outputs are logits and whether the weights that it hands out
    are softmax or sigmoid scores; where that fails (a gate that needs more than tokens) the class' attributes and its source
    decide. Nothing of the model is run or changed.

    **Shape**
        - Each gate's weight is `(experts, dim)`, whichever side is shorter.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(16, 4)
    ...         self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    >>> find_gates(nn.Sequential(Block(), Block()))
    [Gate('0.router', 4 experts x 16, softmax, output: logits), Gate('1.router', 4 experts x 16, softmax, output: logits)]
    """
    gates: list[Gate] = []
    inside: list[str] = []  # prefixes of what lies in gates found so far
    for name, block in model.named_modules():
        for path, router in _candidates(name, block):
            if not f"{path}.".startswith(tuple(inside)) and (found := _gates_in(path, router, block)):
                gates += found
                inside.append(f"{path}." if path else "")
        if not f"{name}.".startswith(tuple(inside)):
            gates += _raw_gates(name, block)
    return gates


def looks_like_gate(name: str, module: nn.Module) -> bool:
    """By the name of the attribute or of the class."""
    return bool(_GATE_NAME.fullmatch(name.lower()) or _GATE_CLASS.search(type(module).__name__))


def gate_in(name: str, module: nn.Module, parent: nn.Module | None) -> list[Gate]:
    """The gates in a module that the caller says is one, whatever its name and neighbours."""
    found = _gates_in(name, module, parent if parent is not None else module)
    if not found:
        for path, parameter in _matrices(module):
            found = _read_as(name, module, parent, path, parameter, parameter.shape[0])
    return found


def _candidates(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not name and _GATE_CLASS.search(type(block).__name__):
        yield name, block
    for child_name, child in block.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, nn.ModuleList) and _GATE_NAME.fullmatch(child_name.lower()):
            yield from ((f"{path}.{key}", element) for key, element in child.named_children())
        elif looks_like_gate(child_name, child):
            yield path, child


def _gates_in(name: str, router: nn.Module, block: nn.Module) -> list[Gate]:
    # PEFT: the trainable copy of `modules_to_save`, or what a parametrizing wrapper stands around
    if hasattr(router, "modules_to_save") and hasattr(router, "active_adapters"):
        key = router.active_adapters[0]
        return _gates_in(f"{name}.modules_to_save.{key}", router.modules_to_save[key], block)
    if hasattr(router, "get_delta_weight") and not isinstance(router, nn.Linear):
        wrapped = _gates_in(f"{name}.base_layer", router.base_layer, block)
        for gate in wrapped:
            gate.adapter = router
            if type(router).__name__ != "ParamWrapper":  # the layer adds B A x to the output: its own holds the logits
                gate.name, gate.module, gate.parameter = name, router, f"base_layer.{gate.parameter}"
        return wrapped
    matrices = list(_matrices(router))
    counts = _counts(router) | _counts(block) | _neighbours(block, router)
    if not counts and _beside_experts(block) and [type(router.get_submodule(path.rpartition(".")[0])) for path, _ in matrices] == [nn.Linear]:
        counts = {len(matrices[0][1])}  # the only layer of a router whose experts do not tell their number
    for slack in range(5 if _GATE_CLASS.search(type(router).__name__) else 1):
        for path, parameter in reversed(matrices):
            sides = parameter.shape if parameter.ndim > 1 else ()
            for count in sorted(counts, reverse=True):
                if sides and (count + slack in sides[-2:] or (parameter.ndim == 3 and count == sides[-1])):
                    return _read_as(name, router, block, path, parameter, count + slack)
                if not sides and parameter.numel() % count == 0 and parameter.numel() > count:
                    return _read_as(name, router, block, path, parameter, count)
    return []


def _raw_gates(name: str, block: nn.Module) -> list[Gate]:
    """A matrix that is a parameter of the block itself."""
    gates: list[Gate] = []
    counts = _counts(block) | _neighbours(block, None)
    for path, parameter in block.named_parameters(recurse=False):
        if _GATE_NAME.fullmatch(path.lower()) and parameter.ndim == 2 and set(parameter.shape) & counts:
            count = max(set(parameter.shape) & counts)
            gates += _read_as(name, block, None, path, parameter, count)
    return gates


def _read_as(name: str, router: nn.Module, block: nn.Module | None, path: str, matrix: Tensor, count: int) -> list[Gate]:
    """The gates whose matrix this is, with their orientation and their reading settled."""
    rows = matrix.shape[-2] if matrix.ndim > 1 else count
    owner = router.get_submodule(path.rpartition(".")[0])
    by_rows = isinstance(owner, nn.Linear) or (rows == count and not multiplied_from_left(owner, path.rpartition(".")[2]))
    transposed = not by_rows and matrix.ndim > 1 and (matrix.shape[-1] == count)
    indices: Iterable[int | None] = range(len(matrix)) if matrix.ndim == 3 else [None]
    gates = []
    for index in indices:
        gate = Gate(name, router, count, path, transposed=transposed, index=index, reads="input")
        gates.append(observe(gate, block))
        gate.name += "" if index is None else f"[{index}]"
    return gates


def _matrices(router: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What may score the experts, at most three levels deep, in the order of registration."""
    for path, parameter in router.named_parameters():
        if path.count(".") > 3 or _NOT_SCORING.search(path.replace("norm_topk", "")) or not parameter.is_floating_point():
            continue
        if parameter.ndim in (2, 3) or (parameter.ndim == 1 and path == "weight"):
            yield path, parameter


def _counts(module: nn.Module) -> set[int]:
    """Numbers of experts that the module's attributes, or its config's, state."""
    counts = set()
    sources = [vars(module), *(vars(vars(module)[key]) for key in ("config", "args") if hasattr(vars(module).get(key), "__dict__"))]
    for source in sources:
        for key, value in source.items():
            if type(value) is int and value > 1 and "expert" in key.lower() and not _NOT_A_COUNT.search(key.lower()):
                counts.add(value)
    if type(vars(module).get("num_keys")) is int:  # product keys: an expert is a pair of keys
        counts.add(2 * vars(module)["num_keys"])
    return counts


def _neighbours(block: nn.Module, router: nn.Module | None) -> set[int]:
    """Numbers of experts that stand in the block: a list of equal modules, or parameters stacked over experts."""
    counts: set[int] = set()
    for name, child in block.named_children():
        if child is router:
            continue
        if "expert" not in name.lower() and "expert" not in type(child).__name__.lower():
            if isinstance(child, nn.ModuleList) and type(router) is nn.Linear:
                counts.add(_alike(child))
            continue
        counts |= _counts(child)
        for path, module in child.named_modules():
            if path.count(".") < 2:
                if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    counts.add(_alike(module))
                counts |= {len(p) for p in module.parameters(recurse=False) if p.ndim == 3}
    return {count for count in counts if count > 1}


def _beside_experts(block: nn.Module) -> bool:
    return any("expert" in name.lower() or "expert" in type(child).__name__.lower() for name, child in block.named_children())


def _alike(container: nn.ModuleList | nn.ModuleDict) -> int:
    classes = [type(child) for child in container.children()]
    return max((classes.count(kind) for kind in set(classes)), default=0)
