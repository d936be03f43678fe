"""The network: 3x3 convolutions of stride 2 with ReLU, then a linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from .config import Config


class Network(nn.Sequential):
    """images (B, C, H, W) float -> logits (B, classes). Layers are named conv1, conv2, ..., head."""

    def __init__(self, config: Config, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.hidden: list[str] = []
        for index, width in enumerate(config.widths, 1):
            self.hidden.append(f"conv{index}")
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, 3, stride=2, padding=1))
            if config.batch_norm:
                self.add_module(f"norm{index}", nn.BatchNorm2d(width))
            self.add_module(f"relu{index}", nn.ReLU())
            channels, side = width, (side + 1) // 2
        self.add_module("flat", nn.Flatten())
        self.add_module("head", nn.Linear(channels * side * side, num_classes))

    def matrices(self) -> list[Tensor]:
        """The weight of every layer as a matrix (out, rest), in order."""
        return [self.get_submodule(name).get_parameter("weight").flatten(1) for name in [*self.hidden, "head"]]
