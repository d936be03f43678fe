"""A parameter, or the slice of one, that belongs to one expert; and what of a parameter may change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Index = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """All of a parameter (`index` None), or the slice `parameter[index]` of it, that belongs to one expert.

    Args:
        parameter: live, of the model.
        index: one slice for each of the leading dimensions, so that what they cut out is a view.
    """

    parameter: nn.Parameter
    index: Index | None = None

    @property
    def tensor(self) -> Tensor:
        """The live view of it."""
        return self.parameter if self.index is None else self.parameter[self.index]

    @property
    def numel(self) -> int:
        if self.index is None:
            return self.parameter.numel()
        count = self.parameter.numel()
        for size, cut in zip(self.parameter.shape, self.index, strict=False):
            count = count // size * len(range(*cut.indices(size)))
        return count

    def __repr__(self) -> str:
        return f"Part({'x'.join(map(str, self.parameter.shape))}{'' if self.index is None else where(self.index)})"


def where(index: Index) -> str:
    """As it is written in code."""
    return f"[{', '.join(map(_text, index))}]"


def _text(cut: slice) -> str:
    ends = ["" if end is None else str(end) for end in (cut.start, cut.stop, cut.step)]
    return ":".join(ends if cut.step is not None else ends[:2])


class Region:
    """What of one stacked parameter may change: the union of some slices. The rest is `outside`.

    Slices of a tensor of other values but the same leading dimensions, as of an optimizer's state, are cut likewise; of a
    DTensor what of them lies on this rank.
    """

    def __init__(self, parameter: nn.Parameter, indices: Iterable[Index]) -> None:
        self.shape = tuple(parameter.shape)
        indices = list(indices)
        self.depth = max(len(index) for index in indices)
        cut = [any(index[d : d + 1] not in ((), (slice(None),)) for index in indices) for d in range(self.depth)]
        # one entry for each position in the dimensions that are cut
        mask = torch.zeros([size if hit else 1 for size, hit in zip(self.shape, cut, strict=False)], dtype=torch.bool)
        for index in indices:
            mask[tuple(part if hit else slice(None) for part, hit in zip(index, cut, strict=False))] = True
        self.mask = mask

    def fits(self, tensor: Tensor) -> bool:
        return tensor.ndim >= self.depth and tuple(tensor.shape[: self.depth]) == self.shape[: self.depth]

    def outside(self, tensor: Tensor) -> Tensor:
        """A copy of what may not change."""
        local, mask = self._local(tensor)
        return _pick(local, ~mask)

    @torch.no_grad()
    def put_outside(self, tensor: Tensor, values: Tensor | float) -> None:
        local, mask = self._local(tensor)
        _put(local, ~mask, values)

    def inside(self, tensor: Tensor) -> Tensor:
        """A copy of what may change."""
        local, mask = self._local(tensor)
        return _pick(local, mask)

    @torch.no_grad()
    def put_inside(self, tensor: Tensor, values: Tensor) -> None:
        local, mask = self._local(tensor)
        _put(local, mask, values)

    def only(self, gradient: Tensor) -> Tensor:
        """The gradient, zero outside."""
        local, mask = self._local(gradient)
        while mask.ndim < local.ndim:
            mask = mask[..., None]
        return torch.where(mask, local, torch.zeros((), dtype=local.dtype, device=local.device))

    def _local(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        tensor: Any = whole.detach()
        mask = self.mask
        if hasattr(tensor, "to_local"):
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            for dim in range(mask.ndim):
                if mask.shape[dim] > 1:
                    mask = mask.narrow(dim, offset[dim] if shape[dim] else 0, shape[dim])
            tensor = tensor.to_local()
        return tensor, mask.to(tensor.device)


def _pick(local: Tensor, mask: Tensor) -> Tensor:
    dim = _only_dim(mask)
    if dim is None:
        return local[_spread(mask, local)]
    return local.index_select(dim, mask.flatten().nonzero().flatten())


def _put(local: Tensor, mask: Tensor, values: Tensor | float) -> None:
    dim = _only_dim(mask)
    if dim is None:
        local[_spread(mask, local)] = values
    elif isinstance(values, Tensor):
        local.index_copy_(dim, mask.flatten().nonzero().flatten(), values.to(local.device))
    else:
        local.index_fill_(dim, mask.flatten().nonzero().flatten(), values)


def _only_dim(mask: Tensor) -> int | None:
    cut = [dim for dim, size in enumerate(mask.shape) if size > 1]
    return (cut or [0])[0] if len(cut) < 2 and mask.numel() else None


def _spread(mask: Tensor, local: Tensor) -> Tensor:
    while mask.ndim < local.ndim:
        mask = mask[..., None]
    return mask.expand(local.shape)
