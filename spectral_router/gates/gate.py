"""Gate: one router gate of a model, where its matrix is and how its probabilities are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .._precision import at_least_float32, full_precision
from .._sharding import whole
from .adapters import adapted
from .computed import computed
from .scoring import SCORES

Reads = Literal["logits", "probs", "input"]


@dataclass(eq=False, repr=False)
class Gate:
    """One router gate of a model: its matrix, live, and how the probabilities over its experts are read.

    Args:
        name: path, in the model, of the module that is hooked, or of a raw parameter of a block; for a matrix inside a
            stack, with `[i]` at its end.
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
        assumed: the weights that the gate handed out in its trial fit no scoring of W x + b that is known here.
        block: the module that the gate was found in, beside the experts that it scores; for `experts_of`.
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
    assumed: bool = False
    block: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORES:
            raise ValueError(f"scoring must be one of {', '.join(SCORES)}, got scoring={self.scoring!r}")
        if self.reads not in ("logits", "probs", "input"):
            raise ValueError(f'reads must be "logits", "probs" or "input", got reads={self.reads!r}')

    @property
    def weight(self) -> Tensor:
        """W, live, `(experts, dim)`: a view of the parameter, or the effective weight under PEFT's adapters."""
        weight = self.matrix
        # during a forward a parametrization may have added BA already
        if self.adapter is not None and not hasattr(self.owner, "parametrizations"):
            weight = adapted(weight, self.adapter)
        if self.index is not None:
            weight = weight[self.index]
        if weight.ndim == 1:
            weight = rearrange(weight, "(k d) -> k d", k=self.num_experts)
        weight = weight.mT if self.transposed else weight
        return weight if len(weight) == self.num_experts else weight[: self.num_experts]

    @property
    def owner(self) -> nn.Module:
        """The module whose attribute the matrix is."""
        return self.module.get_submodule(self.parameter.rpartition(".")[0])

    @property
    def matrix(self) -> Tensor:
        """The parameter itself, however it lies."""
        owner, name = self.owner, self.parameter.rpartition(".")[2]
        made = computed(owner, name)
        matrix: Tensor = getattr(owner, name) if made is None else made
        return matrix

    @property
    def dim(self) -> int:
        """D, the length of the vectors that the matrix scores."""
        shape = getattr(self.matrix, "ds_shape", self.matrix.shape)  # under ZeRO-3 the parameter itself is empty
        return shape[0] // self.num_experts if len(shape) == 1 else shape[-2 if self.transposed else -1]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, logits: bool = False) -> Tensor:
        """Probabilities `(*, K)` over all experts, or their logits, in float32 or better, from one call of the module."""
        if self.probs is not None:
            return self.probs(next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), output)
        if self.reads == "input":
            tokens = first_tokens(args, kwargs, self.dim)
            tokens = tokens if self.index is None else tokens[self.index]
            with full_precision(tokens.device):
                scores = self.logits(tokens)
            return scores if logits else self.score(scores)
        if isinstance(output, Tensor) != (self.position is None):
            raise RuntimeError(
                f"gate {self.name!r} is read from {self.how}, but returned a {type(output).__name__} here; pass "
                "wrap_moe(gates=[Gate(...)]) with the right position, or a `probs` function"
            )
        scores = whole(pick(output, self.position))
        scores = scores if scores.shape[-1] == self.num_experts else scores[..., : self.num_experts]
        if logits or self.reads == "probs":
            # no view of the output, which the gate's caller is free to change in place
            return scores.to(scores.dtype if scores.dtype == torch.float64 else torch.float32, copy=True)
        return self.score(at_least_float32(scores))

    def score(self, logits: Tensor) -> Tensor:
        """What the gate makes of its logits: probabilities."""
        return SCORES[self.scoring](logits)

    @property
    def has_logits(self) -> bool:
        """Whether one logit for each expert can be read."""
        return self.probs is None and self.reads != "probs" and self.scoring != "product_keys"

    def logits(self, tokens: Tensor) -> Tensor:
        """W x + b for tokens `(*, D)`, in float32 or better."""
        weight, bias = whole(self.weight), getattr(self.owner, "bias", None)
        dtype = torch.promote_types(torch.promote_types(tokens.dtype, weight.dtype), torch.float32)
        if not isinstance(bias, Tensor) or bias.shape != (self.num_experts,):
            bias = None
        return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else whole(bias).to(dtype))

    def __repr__(self) -> str:
        return f"Gate({self.name!r}, {self.num_experts} experts x {self.dim}, {self.scoring}, {self.how})"

    @property
    def how(self) -> str:
        """How the probabilities are read, in a few words."""
        if self.probs is not None:
            return "own function"
        place = "output" if self.position is None else f"output[{self.position!r}]"
        way = {"input": "W x + b of its input", "logits": f"{place}: logits", "probs": f"{place}: probs"}[self.reads]
        return f"{way} (scoring assumed)" if self.assumed else way


def first_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int) -> Tensor:
    """The first floating-point tensor of a call that can be what the matrix scores."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (dim,):
            return value
    shapes = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    raise ValueError(f"a gate whose logits are computed from its input must get tokens (*, {dim}), got shapes {shapes}")


def pick(output: Any, position: int | str | None) -> Tensor:
    if position is None:
        return output
    if isinstance(position, str) and not isinstance(output, Mapping):
        return getattr(output, position)
    return output[position]
