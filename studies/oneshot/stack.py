"""The experts of one layer of many copies of a model.

Shapes: C copies, n images for each, d width, h hidden width, K experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.image_classification.model import Experts


class Stack(NamedTuple):
    """One layer's experts of C copies, those of a copy side by side: two matmuls run them all."""

    w_in: Tensor  # (C, d, K h)
    b_in: Tensor  # (C, 1, K h)
    w_out: Tensor  # (C, K h, d)
    b_out: Tensor  # (C, K, d)

    @classmethod
    def of(cls, experts: Experts) -> Stack:
        """A single copy, C = 1."""
        w_in, b_in, w_out, b_out = (parameter.detach() for parameter in experts.parameters())
        return cls(w_in.transpose(0, 1).flatten(1)[None], b_in.view(1, 1, -1), w_out.flatten(0, 1)[None], b_out[None, :, 0])

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (C or 1, n, d), weights (C or 1, n, K) -> equation 1, (C, n, d): `Experts.forward`, weighted before w_out."""
        copies, experts, _ = self.b_out.shape
        inside = torch.baddbmm(self.b_in, x.expand(copies, -1, -1), self.w_in).relu_()
        weights = weights.to(inside.dtype).expand(copies, -1, -1)
        inside = (inside.unflatten(-1, (experts, -1)) * weights[..., None]).flatten(-2)
        return torch.baddbmm(torch.bmm(weights, self.b_out.to(weights.dtype)), inside, self.w_out)

    def only(self, winner: Tensor) -> Stack:
        """Of a gradient: that of one expert of each copy (C,); zero for the others, which both optimizers then leave alone."""
        keep = F.one_hot(winner, self.b_out.shape[1]).to(self.b_out.dtype)
        inside = keep.repeat_interleave(self.w_out.shape[1] // self.b_out.shape[1], dim=1)
        return Stack(
            self.w_in * inside[:, None],
            self.b_in * inside[:, None],
            self.w_out * inside[..., None],
            self.b_out * keep[..., None],
        )

    def norms(self) -> Tensor:
        """The norm of each expert (C, K), over all of its parameters."""
        w_in, b_in, w_out, b_out = (tensor.square() for tensor in self)
        inside = w_in.sum(1) + b_in.sum(1) + w_out.sum(2)
        return (inside.unflatten(1, (b_out.shape[1], -1)).sum(2) + b_out.sum(2)).sqrt()
