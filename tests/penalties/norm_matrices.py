"""Weights for the tests of SpectralNormPenalty, and what the tests read off it."""

import torch
from torch import Tensor, nn


def layers(*shapes: tuple[int, ...], scale: float = 1.0) -> list[nn.Parameter]:
    return [nn.Parameter(scale * torch.randn(shape)) for shape in shapes]


def dominated(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    """With one dominant direction each: few iterations find it, and the gradient is unique."""
    weights = layers(*shapes)
    for weight in weights:
        matrix = weight.data.flatten(1)
        matrix += 5 * torch.outer(torch.randn(len(matrix)), torch.randn(matrix.shape[1]))
    return weights


def gradients(penalty: nn.Module, weights: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(penalty(weights), weights))


def iterates(penalty: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in penalty.named_buffers()}
