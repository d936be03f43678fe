"""What in a model tells the number of its experts, and which matrices may score them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .computed import computed

# inside a router: not what scores the experts
_NOT_SCORING = re.compile(r"noise|bias|norm|scale|statics|lora_|temperature|_inv_")
_EXPERTS = re.compile(r"expert|moe|mixture", re.I)
# stacks of matrices in these are heads
_HEADS = re.compile(r"att|head|conv|rnn|lstm|gru|ssm|mamba|ret|delta", re.I)
_NOT_A_COUNT = re.compile(r"_per|top|shared|capacity|size|dim|hidden|group|parallel|rank|idx|index|_id|layer|step|freq|dense")


def matrices(router: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What may score the experts, at most three levels deep, in the order of registration."""
    seen = set()
    for path, parameter in router.named_parameters():
        before, _, parametrized = path.partition("parametrizations.")
        if parametrized:  # as `torch.nn.utils.parametrizations` leave it: the attribute is computed from it
            path = before + parametrized.partition(".")[0]
        owner = router.get_submodule(path.rpartition(".")[0])
        # likewise of `torch.nn.utils.spectral_norm` and its like: weight_orig, or weight_g and weight_v
        if (bare := re.sub(r"_(orig|g|v)$", "", path)) != path and computed(owner, bare.rpartition(".")[2]) is not None:
            path = bare
        if path in seen:
            continue
        seen.add(path)
        matrix: Tensor = getattr(owner, path.rpartition(".")[2])
        if path.count(".") > 3 or _NOT_SCORING.search(path) or not parameter.is_floating_point():
            continue
        if matrix.ndim in (2, 3) or (matrix.ndim == 1 and path == "weight"):
            yield path, matrix


def counts_in(module: nn.Module, own: bool = False) -> set[int]:
    """Numbers of experts that the module's attributes, or its config's, state."""
    counts = set()
    sources = [
        vars(module),
        *(vars(vars(module)[key]) for key in ("config", "args") if not own and hasattr(vars(module).get(key), "__dict__")),
    ]
    for source in sources:
        for key, value in source.items():
            if type(value) is int and value > 1 and "expert" in key.lower() and not _NOT_A_COUNT.search(key.lower()):
                counts.add(value)
    if type(vars(module).get("num_keys")) is int:  # product keys: an expert is a pair of keys
        counts.add(2 * vars(module)["num_keys"])
    return counts


def counts_beside(block: nn.Module, router: nn.Module | None) -> set[int]:
    """Numbers of experts that stand in the block: a list of equal modules, or parameters stacked over experts."""
    counts: set[int] = set()
    stacks = [(name, len(parameter)) for name, parameter in block.named_parameters(recurse=False) if parameter.ndim == 3]
    several = len(stacks) > 1 and not _HEADS.search(type(block).__name__)
    counts |= {size for name, size in stacks if several or _EXPERTS.search(f"{name} {type(block).__name__}")}
    for name, child in block.named_children():
        if child is router:
            continue
        if not _holds_experts(name, child):
            if isinstance(child, nn.ModuleList) and type(router) is nn.Linear:
                counts.add(_alike(child))
            continue
        counts |= counts_in(child)
        for path, module in child.named_modules():
            if path.count(".") < 2:
                if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    counts.add(_alike(module))
                counts |= {len(p) for p in module.parameters(recurse=False) if p.ndim == 3}
    return {count for count in counts if count > 1}


def beside_experts(block: nn.Module) -> bool:
    return any(_holds_experts(name, child) for name, child in block.named_children())


def _holds_experts(name: str, child: nn.Module) -> bool:
    return "expert" in f"{name} {type(child).__name__}".lower()


def _alike(container: nn.ModuleList | nn.ModuleDict) -> int:
    # an expert that PEFT adapts is of the class of the others all the same
    classes = [type(getattr(child, "base_layer", child)) for child in container.children()]
    return max((classes.count(kind) for kind in set(classes)), default=0)


@contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """The empty parameters of ZeRO-3 have their shapes for a while, all entries one 1 in memory, so that no rank waits."""
    empty = {p: p.data for p in model.parameters() if hasattr(p, "ds_shape") and not p.numel()}
    for parameter in empty:
        parameter.data = torch.ones((), dtype=parameter.dtype, device=parameter.device).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in empty.items():
            parameter.data = data
