"""The network of section 3.1: convolutional stem, N MoE layers, linear head.

Shapes: B images, d width, h hidden width, K experts, L layers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import ImportanceConstraint, LossFreeBias, PrototypeRouter, RouterOutput, route

from . import terms
from .config import ROUTERS, Config, RouterSpec

STEM_WIDTHS = (32, 64, 128)


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on CUDA; plain float32 on the CPU, where results must repeat exactly."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class LinearRouter(nn.Module):
    """The baseline: w = softmax(W z + b), over all experts."""

    def __init__(self, dim: int, num_experts: int, controller: ImportanceConstraint | LossFreeBias | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts)
        self.controller = controller

    def forward(self, x: Tensor) -> RouterOutput:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight, self.gate.bias)
            return route(logits, controller=self.controller, dtype=x.dtype)


class Experts(nn.Module):
    """K expert MLPs d -> h -> d, run as two batched matmuls. Each parameter's first dimension is the expert."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b_in = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b_out = nn.Parameter(torch.zeros(num_experts, 1, dim))
        # as nn.Linear draws its weights
        nn.init.uniform_(self.w_in, -(dim**-0.5), dim**-0.5)
        nn.init.uniform_(self.w_out, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (B, d), weights (B, K) -> the weighted sum of the experts' outputs, equation 1, (B, d)."""
        # product and bias in one kernel, ReLU in place, a plain weighted sum: einsum would copy both factors for its matmul
        inside = torch.baddbmm(self.b_in, x.expand(len(self.w_in), -1, -1), self.w_in).relu_()
        outputs = torch.baddbmm(self.b_out, inside, self.w_out)  # (K, B, d)
        return (outputs * weights.to(outputs.dtype).mT[..., None]).sum(0)


class MoELayer(nn.Module):
    """z' = LayerNorm(ReLU(Linear(z))), then sum_i w_i(z') E_i(z'); with --residual z is added, which the paper does not do."""

    def __init__(self, config: Config, spec: RouterSpec) -> None:
        super().__init__()
        self.residual = config.residual
        self.processor = nn.Sequential(nn.Linear(config.dim, config.dim), nn.ReLU(), nn.LayerNorm(config.dim))
        self.router: nn.Module
        controller = terms.controller(config, spec.balance)
        if spec.gate == "linear":
            self.router = LinearRouter(config.dim, config.experts, controller)
        else:
            self.router = PrototypeRouter(
                config.dim,
                config.experts,
                temperature=config.temperature,  # type: ignore[arg-type]  # Config.validate has seen to it
                metric=config.metric,  # type: ignore[arg-type]
                controller=controller,
            )
        self.experts = Experts(config.experts, config.dim, config.hidden)

    def forward(self, z: Tensor) -> tuple[Tensor, RouterOutput]:
        inside = self.processor(z)
        routed = self.router(inside)
        mixed = self.experts(inside, routed.weights)
        return (z + mixed if self.residual else mixed), routed

    @property
    def router_weight(self) -> Tensor:
        """The matrix W_l of equations 3 to 5, (K, d): prototypes, or the weight of the linear gate."""
        if isinstance(self.router, PrototypeRouter):
            return self.router.prototypes
        assert isinstance(self.router, LinearRouter)
        return self.router.gate.weight


class SRMoE(nn.Module):
    """images (B, C, H, W) float -> class logits (B, classes), and for each layer the router's output."""

    def __init__(self, config: Config, router: str, channels: int, num_classes: int) -> None:
        super().__init__()
        stem: list[nn.Module] = []
        for index, width in enumerate(STEM_WIDTHS):
            batch_norm = config.stem_norm == "batch"
            stem.append(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=not batch_norm))
            stem += [nn.BatchNorm2d(width)] if batch_norm else []
            stem.append(nn.ReLU())
            # one pooling only: with two, a 28-pixel image is a single pixel before its last convolution
            stem += [nn.MaxPool2d(2)] if index == 0 else []
            channels = width
        self.stem = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config.dim))
        self.layers = nn.ModuleList(MoELayer(config, ROUTERS[router]) for _ in range(config.layers))
        self.head = nn.Linear(config.dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, list[RouterOutput]]:
        z = self.stem(images)
        routed = []
        for layer in self.layers:
            z, output = layer(z)
            routed.append(output)
        return self.head(z), routed

    @torch.no_grad()
    def prototypes_from(self, images: Tensor, generator: torch.Generator) -> None:
        """Place the prototypes of every layer on what that layer gets of `images` (B, C, H, W) float."""
        z = self.stem(images)
        for layer in self.moe_layers:
            if isinstance(layer.router, PrototypeRouter):
                layer.router.init_from(layer.processor(z), generator=generator)
            z, _ = layer(z)

    def router_weights(self) -> list[Tensor]:
        return [layer.router_weight for layer in self.moe_layers]

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [layer for layer in self.layers if isinstance(layer, MoELayer)]
