"""One run: a new network, trained with one arm's penalty."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.image_classification.data import ImageSet, as_float, to_layout
from examples.image_classification.model import mixed_precision

from .arms import ARMS, penalty, terms
from .config import Config
from .measure import geometry
from .model import Network


class Trained(NamedTuple):
    network: Network
    history: list[dict[str, Any]]  # one row an epoch


def coefficient(config: Config, arm: str, multiple: float) -> float:
    published = ARMS[config.study][arm].published
    return 0.0 if published is None else multiple * published


def build(config: Config, seed: int, data: ImageSet) -> Network:
    """For one seed every arm starts with the same weights."""
    torch.manual_seed(seed)
    network = Network(config, data.images.shape[1], data.images.shape[-1], len(data.classes))
    return network.to(data.images.device).to(memory_format=torch.channels_last)


def optimizer_for(config: Config, network: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Weight decay on what penalties see: matrices, neither biases nor batch norm."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}, {"params": others}]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def batches(config: Config, members: Tensor, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices, batch by batch, as seed and epoch alone decide. A last, smaller one is left out, unless it is the only one."""
    order = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))]
    if device.type == "cuda":
        order = order.pin_memory()
    full = max(len(order) // config.batch_size, 1) * config.batch_size
    return order.to(device, non_blocking=True)[:full].split(config.batch_size)


def train(config: Config, arm: str, multiple: float, seed: int, data: ImageSet, members: Tensor) -> Trained:
    """Train on the images `members`. What differs between arms is the penalty or, for weight decay, the optimizer's number."""
    device = data.images.device
    network = build(config, seed, data)
    parts, coef = terms(arm, network.hidden, seed), coefficient(config, arm, multiple)
    decay = config.weight_decay + (coef if arm == "weight-decay" else 0.0)
    optimizer = optimizer_for(config, network, decay)
    steps = config.epochs * len(batches(config, members, seed, 0, torch.device("cpu")))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    for epoch in range(config.epochs):
        network.train()
        chosen = batches(config, members, seed, epoch, device)
        sums = torch.zeros(2, device=device)
        for batch in chosen:
            images = to_layout(as_float(data.images[batch]))
            with mixed_precision(device):
                logits = network(images)
            task = F.cross_entropy(logits.float(), data.labels[batch])
            added = penalty(network, parts) if parts else task.new_zeros(())
            optimizer.zero_grad(set_to_none=True)
            (task + coef * added).backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([task.detach(), added.detach()])
        # the epoch's only wait for the device
        task_mean, penalty_mean = (sums / len(chosen)).tolist()
        history.append({"task": task_mean, "penalty": penalty_mean, **geometry(network)})
    return Trained(network, history)
