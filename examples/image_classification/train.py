"""The training loop, with a checkpoint after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.shared.storage import going_on, load_checkpoint, save_checkpoint
from spectral_router import gate_param_groups

from .config import Config
from .data import ImageSet, Split, as_float, augment, to_layout
from .evaluate import accuracy, predict, right, spectra
from .model import SRMoE, mixed_precision
from .objective import Objective, Terms

INIT_BATCH = 512


Step = Callable[[SRMoE, Objective, Tensor, Tensor], tuple[Terms, Tensor]]


class Trained(NamedTuple):
    model: SRMoE
    objective: Objective
    history: list[dict[str, Any]]


def build(config: Config, router: str, seed: int, data: ImageSet, device: torch.device) -> tuple[SRMoE, Objective]:
    """A new model. The stem is built first, so that for one seed it starts the same under every router."""
    torch.manual_seed(seed)
    model = SRMoE(config, router, data.images.shape[1], len(data.classes))
    model = model.to(device).to(memory_format=torch.channels_last)
    return model, Objective(config, router, device).to(device)


def train(
    config: Config,
    router: str,
    seed: int,
    data: ImageSet,
    split: Split,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, Any]], None],
) -> Trained:
    """Train, or go on from `checkpoint`. Batches depend on seed and epoch alone: on the CPU both end in the same weights."""
    device = data.images.device
    model, objective = build(config, router, seed, data, device)
    parameters: Any = model.parameters()
    if config.gate_lr_scale != 1:
        parameters = gate_param_groups(model, config.lr, gate_lr_scale=config.gate_lr_scale)
    optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device)
        with going_on(checkpoint):
            model.load_state_dict(state["model"])
            restore_buffers(objective, state["objective"])
            optimizer.load_state_dict(state["optimizer"])
            history = state["history"]
        for row in history:
            on_epoch(row)
    elif config.prototypes == "data":
        first = split.train[torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed))[:INIT_BATCH]]
        images = to_layout(as_float(data.images[first.to(device)]))
        model.prototypes_from(images, torch.Generator(device).manual_seed(seed))
    step = compiled(device) if config.compile else forward
    for epoch in range(len(history), config.epochs):
        row = _train_epoch(config, step, model, objective, optimizer, data, split.train, seed * 100_003 + epoch)
        val = split.val.to(device)
        logits, weights = predict(model, data.images[val])
        row |= {"epoch": epoch + 1, "val_accuracy": accuracy(logits, data.labels[val])}
        if epoch + 1 < config.epochs:  # what is planted after the last epoch would not be trained
            row["rescued"] = objective.after_epoch(model, weights, optimizer)
        history.append(row | spectra(model))
        save_checkpoint(
            checkpoint,
            {
                "model": model.state_dict(),
                "objective": dict(objective.named_buffers()),  # with those that state_dict leaves out: iterates
                "optimizer": optimizer.state_dict(),
                "history": history,
            },
        )
        on_epoch(row)
    return Trained(model, objective, history)


def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put buffers back, also those that a penalty makes at its first call."""
    for name, value in buffers.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).register_buffer(leaf, value)


def forward(model: SRMoE, objective: Objective, images: Tensor, labels: Tensor) -> tuple[Terms, Tensor]:
    logits, routed = model(images)
    return objective(model, logits, routed, labels), right(logits, labels).sum()


def compiled(device: torch.device) -> Step:
    """`forward` by torch's compiler; on a GPU with CUDA graphs, as a step is many small operations."""
    return torch.compile(forward, mode="reduce-overhead" if device.type == "cuda" else "default")


def _train_epoch(
    config: Config,
    step: Step,
    model: SRMoE,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    members: Tensor,
    seed: int,
) -> dict[str, Any]:
    model.train()
    device = data.images.device
    generator = torch.Generator(device).manual_seed(seed)
    order = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]
    if device.type == "cuda":
        order = order.pin_memory()
    order = order.to(device, non_blocking=True)
    full = max(len(order) // config.batch_size, 1) * config.batch_size
    batches = order[:full].split(config.batch_size)  # a last, smaller batch is left out, unless it is the only one
    sums = torch.zeros(5, device=device)
    for batch in batches:
        images = to_layout(as_float(augment(data.images[batch], data.augment, generator)))
        sums += train_step(step, model, objective, optimizer, images, data.labels[batch])
    # the epoch's only wait for the device; all batches have one size
    loss, task, penalty, balance, correct = (sums / len(batches)).tolist()
    return {"loss": loss, "task": task, "penalty": penalty, "balance": balance, "train_accuracy": 100 * correct}


def train_step(
    step: Step,
    model: SRMoE,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """One update. The terms of equation 7 before it, and the share of images that were right, (5,)."""
    optimizer.zero_grad(set_to_none=True)  # first of all: CUDA graphs take the memory of the last step's gradients
    with mixed_precision(images.device):
        parts, correct = step(model, objective, images, labels)
    parts.total.backward()
    optimizer.step()
    objective.after_step(model)
    return torch.stack([*parts, correct / len(labels)]).detach()
