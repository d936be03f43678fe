"""Weights that a quantiser has left in the place of a parameter: a tensor of its own kind, of whole numbers and scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quantised(matrix: Tensor) -> bool:
    """Whether this is a kind of tensor that holds fewer bits than its dtype says, as torchao's `quantize_` leaves them."""
    kind = type(matrix)
    if kind in (Tensor, nn.Parameter):
        return False
    if kind.dequantize is not Tensor.dequantize:
        return True
    if not hasattr(matrix, "__tensor_flatten__"):
        return False
    inner = [getattr(matrix, name) for name in matrix.__tensor_flatten__()[0]]
    return any(isinstance(part, Tensor) and not part.is_floating_point() for part in inner)


@torch.no_grad()
def numbers(matrix: Tensor) -> Tensor:
    """What it stands for, as a plain tensor without a graph: as it says itself, else what it makes of the unit vectors."""
    if type(matrix).dequantize is not Tensor.dequantize:
        return matrix.dequantize()
    return F.linear(torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device), matrix).mT
