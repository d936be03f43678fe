"""Any penalty on the weights of any layers of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Union

from einops import rearrange
from torch import Tensor, nn

from .._rules import flat, meets
from .._sharding import whole
from .groups import as_matrix

__all__ = ["penalize"]

# a name or its suffix, a regular expression for the full name, a module class, a predicate; or several of them
Modules = Union[str, "re.Pattern[str]", type[nn.Module], Callable[[str, nn.Module], bool], Iterable["Modules"]]

_TAKE = "modules takes"


def penalize(model: nn.Module, penalty: Callable[[Sequence[Tensor]], Tensor], modules: Modules | None = None) -> Tensor:
    """A penalty over the weights of chosen layers of a model, to be added to the loss.

        penalty([W_1, ..., W_L]),    W_l the `weight` of layer l as a matrix (out, rest)

    Any penalty will do: `SpectralNormPenalty`, `SpectralRankPenalty`, your own function of a list of matrices. A convolution
    `(out, in, *kernel)` becomes `(out, in * prod(kernel))`; a transposed one, whose weight is `(in, out, *kernel)`, is turned
    first. A layer or a weight that is used in several places counts once. Of a parametrised layer it is the computed weight;
    of a weight that FSDP2 shards the whole of it, so every rank must call. The order is that of `model.named_modules()`, the
    same on every call, as penalties that remember their matrices need.

    **Shape**
        - Output: what the penalty returns, a scalar, unweighted.

    Args:
        model: any module.
        penalty: a callable (list of matrices) -> scalar.
        modules: None takes every `nn.Linear` and every convolution; or a name or its suffix, a regular expression that matches
            the full name, a module class, a predicate (name, module) -> bool, or several of these. Of the modules so named,
            those with a `weight` of two dimensions or more count. A matrix that is no module's `weight`, such as the
            `in_proj_weight` of `nn.MultiheadAttention`, is not seen: give it to the penalty yourself.

    Raises:
        ValueError: nothing in the model is chosen, or one of several choices matches nothing; a string that is neither a name
            nor a regular expression.
        TypeError: a choice of the wrong kind, or a penalty that is no callable.

    >>> import torch
    >>> from spectral_router import SpectralNormPenalty
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    >>> penalty = SpectralNormPenalty()
    >>> loss = model(torch.randn(2, 3, 4, 4)).square().mean() + 0.005 * penalize(model, penalty)
    >>> penalize(model, lambda weights: print(*(tuple(weight.shape) for weight in weights)))
    (8, 27) (4, 32)
    """
    if not callable(penalty):
        raise TypeError(f"penalty must be a callable of a list of matrices, got {penalty!r}")
    rules = [_is_layer] if modules is None else flat(modules, _TAKE, "several of these")
    weights: dict[int, tuple[nn.Module, Tensor]] = {}
    unmet = list(range(len(rules)))
    for name, module in model.named_modules():
        met = [index for index, rule in enumerate(rules) if meets(rule, name, module, _TAKE)]
        weight = getattr(module, "weight", None) if met else None
        if isinstance(weight, Tensor) and weight.ndim > 1:
            weights.setdefault(id(weight), (module, weight))
            unmet = [index for index in unmet if index not in met]
    if modules is None and unmet:
        raise ValueError(f"no Linear or convolution found in {type(model).__name__}; choose what to penalise with modules=")
    if unmet or not weights:
        rule = rules[unmet[0]] if unmet else modules
        names = [name for name, module in model.named_modules() if _is_layer(name, module)][:5]
        hint = f" (it has {', '.join(names)}, for example)" if names else ""
        raise ValueError(f"modules={rule!r} matches no module with a matrix as its weight in {type(model).__name__}{hint}")
    return penalty([as_matrix(_by_output(module, whole(weight))) for module, weight in weights.values()])


def _is_layer(name: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """With the outputs in front, as all but transposed convolutions have them."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        return rearrange(weight, "(g i) o ... -> (g o) i ...", g=module.groups)
    return weight
