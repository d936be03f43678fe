"""What a model says of images, without gradient: predictions, accuracy, and the spectra of its routers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_router.functional import spectral_norm, stable_rank

from .data import as_float, to_layout
from .model import SRMoE, mixed_precision

PIXELS = {"cpu": 1 << 16, "cuda": 1 << 22}  # in one forward without gradient: on a CPU what its cache holds


def in_batches(images: Tensor) -> Sequence[Tensor]:
    """Images (n, C, H, W) in batches for a forward without gradient."""
    return images.split(max(1, PIXELS[images.device.type] // (images.shape[-2] * images.shape[-1])))


@torch.no_grad()
def predict(model: SRMoE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) uint8 -> logits (n, classes), the experts' weights (n, L, K), both float32, in eval mode, batch by
    batch. The weights are those that were used, with what a controller did to them."""
    model.eval()
    logits, weights = [], []
    for batch in in_batches(images):
        with mixed_precision(images.device):
            output, routed = model(to_layout(as_float(batch)))
        logits.append(output.float())
        weights.append(torch.stack([layer.weights.float() for layer in routed], dim=1))
    return torch.cat(logits), torch.cat(weights)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(*, classes), (*) -> (*). Logits that are NaN or infinite are never right, whatever argmax makes of them."""
    return (logits.argmax(-1) == labels) & logits.isfinite().all(-1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent, from an exact count."""
    return 100 * int(right(logits, labels).sum()) / len(labels)


@torch.no_grad()
def spectra(model: SRMoE) -> dict[str, list[float]]:
    """Spectral norm and stable rank of each layer's router weight."""
    weights = torch.stack(model.router_weights())
    return {"spectral_norm": spectral_norm(weights).tolist(), "stable_rank": stable_rank(weights).tolist()}
