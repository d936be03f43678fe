"""The training loop, with a checkpoint after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.image_classification.data import ImageSet, Split, as_float, augment, to_layout
from examples.image_classification.evaluate import accuracy, right
from examples.image_classification.model import mixed_precision
from examples.shared.storage import going_on, load_checkpoint, save_checkpoint
from spectral_router import ImportanceConstraint, ImportanceKLLoss, LoadBalanceLoss

from .config import ARMS, Config
from .model import Network, Routed

EVAL_BATCH = 512
# The paper's 150 epochs: rate 1e-3 for 80, 1e-4 until 120, then 1e-5.
MILESTONES = (80 / 150, 120 / 150)


class Trained(NamedTuple):
    network: Network
    history: list[dict[str, Any]]


def build(config: Config, arm: str, seed: int, data: ImageSet, device: torch.device) -> Network:
    torch.manual_seed(seed)
    network = Network(config, arm, data.images.shape[1], len(data.classes))
    return network.to(device).to(memory_format=torch.channels_last)


def rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    return config.lr * 0.1 ** sum(epoch >= milestone * config.epochs for milestone in MILESTONES)


def balance_loss(arm: str) -> nn.Module | None:
    """What a soft arm adds to the loss. It reads the weights, with zeros for the experts that were not chosen."""
    if ARMS[arm].loss == "importance":
        return LoadBalanceLoss(unbiased=True)
    return ImportanceKLLoss() if ARMS[arm].loss == "kl" else None


def train(
    config: Config,
    arm: str,
    seed: int,
    data: ImageSet,
    split: Split,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, Any]], None],
) -> Trained:
    """Train, or go on from `checkpoint`. Batches and noise depend on seed and epoch alone: on the CPU both end in the same
    weights, and all arms of a seed see the same images in the same order."""
    device = data.images.device
    network = build(config, arm, seed, data, device)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device)
        with going_on(checkpoint):
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]
        for row in history:
            on_epoch(row)
    for epoch in range(len(history), config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate(config, epoch)
        row = _train_epoch(config, arm, network, optimizer, data, split.train, seed * 100_003 + epoch)
        val = split.val.to(device)
        logits, _ = predict(network, data.images[val])
        row |= {"epoch": epoch + 1, "val_accuracy": accuracy(logits, data.labels[val])}
        history.append(row)
        save_checkpoint(checkpoint, {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "history": history})
        on_epoch(row)
    return Trained(network, history)


def _train_epoch(
    config: Config, arm: str, network: Network, optimizer: torch.optim.Optimizer, data: ImageSet, members: Tensor, seed: int
) -> dict[str, Any]:
    network.train()
    device = data.images.device
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # of the gate's noise
    order = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))].to(device)
    full = max(len(order) // config.batch_size, 1) * config.batch_size
    batches = order[:full].split(config.batch_size)  # a last, smaller batch is left out, unless it is the only one
    balance, constraint = balance_loss(arm), network.constraint
    sums = torch.zeros(3, device=device)
    gate = torch.zeros(4, config.experts, device=device)
    excess = torch.full((), -torch.inf, device=device)
    for batch in batches:
        images = to_layout(as_float(augment(data.images[batch], data.augment, generator)))
        labels = data.labels[batch]
        with mixed_precision(device):
            logits, routed = network(images)
        task = F.cross_entropy(logits.float(), labels)
        unbalance = torch.zeros((), device=device) if balance is None else balance(routed.weights)
        optimizer.zero_grad(set_to_none=True)
        (task + config.soft_coef * unbalance).backward()
        optimizer.step()
        with torch.no_grad():
            sums += torch.stack([task, unbalance, right(logits, labels).float().mean()])
            if routed is not None:
                gate += _use(routed)
            if constraint is not None:
                excess = torch.maximum(excess, _excess(constraint))
    # the epoch's only wait for the device, but for those of the routed experts; all batches have one size
    loss, unbalanced, correct = (sums / len(batches)).tolist()
    row: dict[str, Any] = {"task": loss, "balance": unbalanced, "train_accuracy": 100 * correct}
    if ARMS[arm].moe:
        importance, load, closed, any_closed = (gate / len(batches)).tolist()
        row |= {"importance": importance, "load": load, "closed": closed, "steps_with_closed": any_closed[0]}
    if constraint is not None:
        row["excess"] = float(excess)
    return row


def _use(routed: Routed) -> Tensor:
    """Of one batch, (4, K): mean weight, share of the images that are sent, closed or not, and whether any is closed."""
    shares = [routed.weights.mean(0), (routed.weights > 0).float().mean(0)]
    return torch.stack([*shares, routed.closed, routed.closed.amax().expand_as(routed.closed)])


def _excess(constraint: ImportanceConstraint) -> Tensor:
    """How far the most used expert is above the bound after a step; below it the number is negative."""
    fair = 0.0 if constraint.kind == "relative" else 1 / constraint.num_experts
    return constraint.importance.amax() - fair - constraint.bound


@torch.no_grad()
def predict(network: Network, images: Tensor, expert: int | None = None) -> tuple[Tensor, Routed | None]:
    """Images (n, C, H, W) uint8 -> class logits (n, classes) float32 and what the gate decided, in eval mode; `expert`: as in
    `ConvMoE`."""
    network.eval()
    logits, decided = [], []
    for batch in images.split(EVAL_BATCH):
        with mixed_precision(images.device):
            output, routed = network(to_layout(as_float(batch)), expert)
        logits.append(output.float())
        if routed is not None:
            decided.append(routed)
    if not decided:
        return torch.cat(logits), None
    scores, weights = (torch.cat([getattr(part, name) for part in decided]) for name in ("scores", "weights"))
    return torch.cat(logits), Routed(scores, weights, decided[0].closed)
