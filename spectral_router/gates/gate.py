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
from .quantised import numbers, quantised
from .recipe import Recipe
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
        probs: your own reading instead: called as `probs(module, args, kwargs, output)` with all of a call of the module, the
            one that runs (a copy's own, in a copy), returns the probabilities `(tokens, experts)`. A function of a module
            file, not a lambda, if the model is to be pickled.
        adapter: the PEFT layer that adapts the matrix, if there is one.
        assumed: the weights that the gate handed out in its trial fit no scoring of W x + b that is known here.
        block: the module that the gate was found in, beside the experts that it scores; for `experts_of`.
        holder: the module that `parameter` is a path in, where that is not `module`, as for a gate whose scores are read from
            another module than holds the matrix.
        heads: the matrix has heads x experts rows, for heads that choose on their own.
        recipe: how a forward was seen to make the logits (or, if `reads` is "probs", the probabilities) of what the module
            got or gave; `wrap_moe` and `find_gates(model, example=batch)` set it where the other ways misread.
    """

    name: str
    module: nn.Module
    num_experts: int
    parameter: str | tuple[str, ...] = "weight"
    scoring: str = "softmax"
    transposed: bool = False
    index: int | None = None
    reads: Reads = "logits"
    position: int | str | None = None
    probs: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor] | None = None
    adapter: nn.Module | None = None
    assumed: bool = False
    block: nn.Module | None = None
    holder: nn.Module | None = None
    heads: int = 1
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.scoring not in SCORES:
            raise ValueError(f"scoring must be one of {', '.join(SCORES)}, got scoring={self.scoring!r}")
        if self.reads not in ("logits", "probs", "input"):
            raise ValueError(f'reads must be "logits", "probs" or "input", got reads={self.reads!r}')
        if not isinstance(self.num_experts, int):
            raise TypeError(f"num_experts must be a whole number, got num_experts={self.num_experts!r} for {self.name!r}")
        if self.num_experts < 2:
            raise ValueError(
                f"a gate scores at least 2 experts, got num_experts={self.num_experts} for {self.name!r}: one output chooses "
                "among tokens, as in mixture of depths, so there is no spread over experts to keep and no balance between them"
            )

        self._check_matrix()

    def _check_matrix(self) -> None:
        """That it is there, and has a row for each expert, where it lies as a matrix that is not spread or packed."""
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module must be the module of the gate {self.name!r}, got {type(self.module).__name__}")
        if not isinstance(self.parameter, str):
            return
        try:
            matrix = getattr(self.owner, self.parameter.rpartition(".")[2])
        except AttributeError:
            where = type(self.holder or self.module).__name__
            raise ValueError(f"parameter must be the path of a tensor in {where}, got parameter={self.parameter!r}") from None
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.numel():
            return
        rows, needed = matrix.shape[1 if self.transposed else 0], self.heads * self.num_experts
        if rows < needed:
            lies = "columns" if self.transposed else "rows"
            raise ValueError(
                f"num_experts must be at most the {rows} {lies} of {self.parameter}, {matrix.shape[0]} x {matrix.shape[1]}, "
                f"that score the experts, got num_experts={self.num_experts} for {self.name!r}"
                + ("; where the columns score them, pass transposed=True" if not self.transposed else "")
            )

    @property
    def weight(self) -> Tensor:
        """W, live, `(experts, dim)`: a view of the parameter, or the effective weight under PEFT's adapters.

        Of a quantised one, which does not learn, the numbers that it stands for.
        """
        weight = self.matrix
        weight = numbers(weight) if quantised(weight) else weight
        # during a forward a parametrization may have added BA already
        if self.adapter is not None and not hasattr(self.owner, "parametrizations"):
            weight = adapted(weight, self.adapter)
        if self.index is not None:
            weight = weight[self.index]
        if weight.ndim == 1:
            weight = rearrange(weight, "(k d) -> k d", k=self.num_experts)
        weight = weight.mT if self.transposed else weight
        if weight.ndim > 2:  # keys of heads, halves or slots: each is a row
            return weight.flatten(1) if len(weight) == self.num_experts and self._convolves else weight.flatten(0, -2)
        rows = self.heads * self.num_experts
        return weight if len(weight) == rows else weight[:rows]

    @property
    def _convolves(self) -> bool:
        return isinstance(self.owner, nn.modules.conv._ConvNd)

    @property
    def owner(self) -> nn.Module:
        """The module whose attribute the matrix is."""
        path = self.parameter if isinstance(self.parameter, str) else self.parameter[0]
        return (self.holder or self.module).get_submodule(path.rpartition(".")[0])

    @property
    def matrix(self) -> Tensor:
        """The parameter itself, however it lies; of several vectors, one an expert, the stack."""
        if not isinstance(self.parameter, str):
            holder = self.holder or self.module
            vectors = [
                getattr(holder.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.parameter
            ]
            return torch.stack(vectors, 1 if self.transposed else 0)
        owner, name = self.owner, self.parameter.rpartition(".")[2]
        made = computed(owner, name)
        matrix: Tensor = getattr(owner, name) if made is None else made
        return matrix

    @property
    def buffered(self) -> bool:
        """Whether the matrix is a buffer, which is read and does not learn."""
        return isinstance(self.parameter, str) and self.parameter.rpartition(".")[2] in self.owner._buffers

    @property
    def dim(self) -> int:
        """D, the length of the vectors that the matrix scores."""
        shape = getattr(self.matrix, "ds_shape", self.matrix.shape)  # under ZeRO-3 the parameter itself is empty
        if len(shape) == 4 and self._convolves:
            return shape[1] * shape[2] * shape[3]
        return shape[0] // self.num_experts if len(shape) == 1 else shape[-2 if self.transposed else -1]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, logits: bool = False) -> Tensor:
        """Probabilities `(*, K)` over all experts, or their logits, in float32 or better, from one call of the module."""
        if self.probs is not None:
            return self.probs(self.module, args, kwargs, output)
        if self.recipe is not None:
            scores = at_least_float32(self.recipe(args, kwargs, output))[..., : self.num_experts]
            return scores if logits or self.reads == "probs" else self.score(scores)
        if self.reads == "input":
            tokens = first_tokens(args, kwargs, self.dim)
            if self.index is not None and tokens.ndim > 2 and len(tokens) == len(self.matrix):  # one part of them each
                tokens = tokens[self.index]
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
        if self.recipe is not None:
            return f"observed: {self.recipe}"
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
