"""What is measured of a trained network. Accuracies are in percent, losses means of the cross-entropy in nats."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.image_classification.data import ImageSet, as_float, to_layout
from examples.image_classification.evaluate import accuracy
from examples.image_classification.model import mixed_precision
from spectral_router.functional import hyperspherical_energy, spectral_norm

from .config import Config
from .data import Split
from .model import Network

EVAL_BATCH = 512
# the layers have different shapes; a mean is over few numbers
PER_LAYER = ("sigma", "energy", "half_energy")


@torch.no_grad()
def logits_of(network: Network, images: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Images (n, C, H, W) uint8 -> logits (n, classes) float32, in eval mode; noise of one seed is the same for all."""
    network.eval()
    generator = torch.Generator(images.device).manual_seed(seed)
    found = []
    for batch in images.split(EVAL_BATCH):
        inputs = as_float(batch)
        if noise:
            inputs += noise * torch.randn(inputs.shape, generator=generator, device=inputs.device)
        with mixed_precision(images.device):
            found.append(network(to_layout(inputs)).float())
    return torch.cat(found)


def gradient_norm(network: Network, images: Tensor, labels: Tensor) -> float:
    """Mean over images of ‖∂ loss / ∂ image‖₂, each image by itself: the sensitivity of Yoshida & Miyato."""
    network.eval()
    norms = []
    for batch, targets in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        inputs = to_layout(as_float(batch)).requires_grad_()
        with mixed_precision(images.device):
            logits = network(inputs)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), inputs)
        norms.append(slope.float().flatten(1).norm(dim=1))
    return torch.cat(norms).mean().item()


@torch.no_grad()
def geometry(network: Network) -> dict[str, list[float]]:
    """Spectral norm, energy (s = 2) and half-space energy of each layer's weight as a matrix."""
    matrices = network.matrices()
    rows = [
        [spectral_norm(matrix), hyperspherical_energy(matrix), hyperspherical_energy(matrix, half_space=True)]
        for matrix in matrices
    ]
    values = torch.stack([torch.stack(row) for row in rows]).mT.tolist()
    return dict(zip(PER_LAYER, values, strict=True))


def validation(network: Network, data: ImageSet, split: Split) -> dict[str, float]:
    accuracy_, loss = _score(network, data, split.val)
    return {"val_accuracy": accuracy_, "val_loss": loss}


def everything(config: Config, network: Network, data: ImageSet, split: Split, seed: int) -> dict[str, Any]:
    train_accuracy, train_loss = _score(network, data, split.train)
    test_accuracy, test_loss = _score(network, data, split.test)
    test = split.test.to(data.images.device)
    images, labels = data.images[test], data.labels[test]
    noisy = [accuracy(logits_of(network, images, noise, seed), labels) for noise in config.noise]
    found = geometry(network)
    return {
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "gap_accuracy": train_accuracy - test_accuracy,
        "gap_loss": test_loss - train_loss,
        "noise_accuracy": noisy,
        "mean_noise_accuracy": sum(noisy) / len(noisy),
        "gradient_norm": gradient_norm(network, images, labels),
        **found,
        **{f"mean_{name}": sum(found[name]) / len(found[name]) for name in PER_LAYER},
    }


def _score(network: Network, data: ImageSet, members: Tensor) -> tuple[float, float]:
    members = members.to(data.images.device)
    logits, labels = logits_of(network, data.images[members]), data.labels[members]
    return accuracy(logits, labels), F.cross_entropy(logits, labels).item()
