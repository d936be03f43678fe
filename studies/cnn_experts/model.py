"""ResNet-18 with one stage replaced by a sparse mixture of narrow copies of that stage.

Shapes: B images, C channels, H = W pixels, K experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from spectral_router import ImportanceConstraint, route

from .config import ARMS, Config

GATE_PLANES = 4  # of the convolutional gate, in widths of the network: 256 in ResNet-18


class Routed(NamedTuple):
    """What the gate decided.

    scores: (B, K), the gate's logits without noise.
    weights: (B, K), 0 for the experts that are not chosen; rows sum to one.
    closed: (K,), 1 for the experts that a constraint closed for this batch.
    """

    scores: Tensor
    weights: Tensor
    closed: Tensor


class Gate(nn.Module):
    """x (B, C, H, W) -> scores (B, K), and the same with noise, N(0, 1) * softplus(W_noise GAP(x) + 0.01), in training."""

    def __init__(self, kind: str, planes: int, hidden: int, num_experts: int, *, noise: bool) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Identity()
        features = planes
        if kind == "conv":
            self.conv, features = nn.Sequential(nn.Conv2d(planes, hidden, 3, padding=1), nn.ReLU()), hidden
        self.fc = nn.Linear(features, num_experts)
        self.noise = nn.Linear(planes, num_experts, bias=False) if noise else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x)
        with torch.autocast(x.device.type, enabled=False):
            scores = self.fc(_pooled(features))
            if self.noise is None or not self.training:
                return scores, scores
            scale = F.softplus(self.noise(_pooled(x)) + 1e-2)
            return scores, scores + torch.randn_like(scores) * scale


class ConvMoE(nn.Module):
    """x (B, C, H, W) -> sum_i w_i(x) E_i(x), one weight an image and expert."""

    def __init__(
        self,
        experts: list[nn.Sequential],
        gate: Gate,
        top_k: int,
        *,
        constraint: ImportanceConstraint | None = None,
        dispatch: str = "routed",
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.constraint = constraint
        self.top_k = top_k
        self.dispatch = dispatch

    def forward(self, x: Tensor, expert: int | None = None) -> tuple[Tensor, Routed]:
        """`expert`: give it all the weight on every image, whatever the gate says."""
        scores, noisy = self.gate(x)
        if self.constraint is not None and self.training:
            closed = (~self.constraint.open).float()
        else:
            closed = torch.zeros_like(scores[0])
        routed = route(noisy, self.top_k, controller=self.constraint)
        weights = torch.zeros_like(scores).scatter(-1, routed.indices, routed.weights)
        used = weights if expert is None else F.one_hot(torch.tensor(expert), len(self.experts)).to(weights).expand_as(weights)
        outputs = self._all(x, used) if self.dispatch == "all" else self._routed(x, used)
        return outputs, Routed(scores, weights, closed)

    def _all(self, x: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts])
        return (outputs * weights.to(outputs.dtype).mT[..., None, None, None]).sum(0)

    def _routed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Each expert on the images that it has a weight for; its batch norm sees no others."""
        shares = weights.mT
        # sizes that depend on values: here the host waits for the device. A weight that is NaN counts, and is passed on.
        expert, image = (shares.detach() != 0).nonzero(as_tuple=True)
        sizes = torch.bincount(expert, minlength=len(self.experts)).tolist()
        pieces = x[image].split(sizes)
        outputs = torch.cat([run(piece) for run, piece in zip(self.experts, pieces, strict=True) if len(piece)])
        outputs = outputs * shares[expert, image].to(outputs.dtype)[:, None, None, None]
        empty = outputs.new_zeros(len(x), *outputs.shape[1:]).contiguous(memory_format=torch.channels_last)
        return empty.index_add(0, image, outputs)


class Network(nn.Module):
    """Images (B, C, H, W) float -> class logits (B, classes), and what the gate decided; None in the plain network."""

    def __init__(self, config: Config, arm: str, channels: int, num_classes: int) -> None:
        super().__init__()
        width = config.width
        if config.stem == "small":
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = [stage(*_shape(width, position)) for position in range(1, 5)]
        self.fc = nn.Linear(8 * width, num_classes)
        _initialize(self.conv1, *layers)
        if ARMS[arm].moe:
            # built last: for one seed all else starts the same in every arm
            layers[config.position - 1] = _mixture(config, arm)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, images: Tensor, expert: int | None = None) -> tuple[Tensor, Routed | None]:
        """`expert`: as in `ConvMoE`."""
        routed = None
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            if isinstance(layer, ConvMoE):
                x, routed = layer(x, expert)
            else:
                x = layer(x)
        return self.fc(x.mean((2, 3))), routed

    @property
    def constraint(self) -> ImportanceConstraint | None:
        return next((module for module in self.modules() if isinstance(module, ImportanceConstraint)), None)


def stage(inplanes: int, planes: int, stride: int, inner: int | None = None) -> nn.Sequential:
    """A stage of ResNet-18, two blocks; `inner` is the width between the two convolutions of each block."""
    first = BasicBlock(inplanes, planes, stride, _shortcut(inplanes, planes, stride))
    second = BasicBlock(planes, planes)
    if inner is not None:
        for block, before, step in ((first, inplanes, stride), (second, planes, 1)):
            block.conv1 = nn.Conv2d(before, inner, 3, stride=step, padding=1, bias=False)
            block.bn1 = nn.BatchNorm2d(inner)
            block.conv2 = nn.Conv2d(inner, planes, 3, padding=1, bias=False)
    return nn.Sequential(first, second)


def inner_planes(config: Config) -> int:
    """The inner planes with which all experts together have about as many parameters as the stage that they replace."""
    if config.inner_planes is not None:
        return config.inner_planes
    shape = _shape(config.width, config.position)
    with torch.device("meta"):
        target, one, two = (parameters(stage(*shape, inner)) for inner in (None, 1, 2))
    # the count is linear in the inner planes
    return max(1, round((target / config.experts - one) / (two - one)) + 1)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _mixture(config: Config, arm: str) -> ConvMoE:
    shape, inner, spec = _shape(config.width, config.position), inner_planes(config), ARMS[arm]
    experts = [stage(*shape, inner) for _ in range(config.experts)]
    _initialize(*experts)
    gate = Gate(config.gate, shape[0], GATE_PLANES * config.width, config.experts, noise=spec.noise)
    constraint = None
    if spec.constraint == "relative":
        constraint = ImportanceConstraint(config.experts, config.relative_bound, kind="relative")
    elif spec.constraint == "mean":
        constraint = ImportanceConstraint(config.experts, config.mean_bound, kind="mean")
    return ConvMoE(experts, gate, config.top_k, constraint=constraint, dispatch=config.dispatch)


def _shape(width: int, position: int) -> tuple[int, int, int]:
    """Planes before a stage, planes after it, and its stride."""
    if position == 1:
        return width, width, 1
    return width * 2 ** (position - 2), width * 2 ** (position - 1), 2


def _shortcut(inplanes: int, planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and inplanes == planes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))


def _initialize(*modules: nn.Module) -> None:
    """As torchvision's ResNet draws its convolutions."""
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _pooled(x: Tensor) -> Tensor:
    """Global average pooling in float32."""
    return x.float().mean((2, 3))
