"""Equation 7 and the training loop, with a checkpoint after every epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.storage import load_checkpoint, save_checkpoint
from spectral_router import RouterOutput
from spectral_router.functional import spectral_norm, stable_rank

from . import terms
from .config import ROUTERS, Config
from .data import ImageSet, Split, as_float, augment
from .model import SRMoE

PIXELS = {"cpu": 1 << 16, "cuda": 1 << 22}  # in one forward without gradient: on a CPU what its cache holds
INIT_BATCH = 512


class Terms(NamedTuple):
    """Equation 7, total = task + alpha * penalty + beta * balance, and its unweighted parts; scalars."""

    total: Tensor
    task: Tensor
    penalty: Tensor
    balance: Tensor


class Objective(nn.Module):
    """Equation 7 for one router. A term that the router does not use is measured all the same, with coefficient 0, unless
    `measure` is set to False: then it is 0."""

    measure = True

    def __init__(self, config: Config, router: str, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.spec = ROUTERS[router]
        # what changes weights, or what sits in the routers, is no term
        self.alpha = config.alpha if self.spec.spectral and config.penalty in terms.PENALTIES else 0.0
        self.beta = config.beta if self.spec.balance and config.balance in terms.BALANCES else 0.0
        self.penalty = terms.penalty(config)
        self.balance = terms.balance(config)
        self.reads = getattr(self.balance, "reads", "probs")  # probs or logits

    def forward(self, model: SRMoE, logits: Tensor, routed: list[RouterOutput], labels: Tensor) -> Terms:
        task = F.cross_entropy(logits.float(), labels)
        penalty = balance = torch.zeros_like(task)
        if self.alpha or self.measure:
            with contextlib.nullcontext() if self.alpha else torch.no_grad():
                penalty = self.penalty(model.router_weights())
        if self.beta or self.measure:
            # The paper's L_div has no sum over layers; summed here, layer by layer.
            with contextlib.nullcontext() if self.beta else torch.no_grad():
                balance = torch.stack([self.balance(getattr(output, self.reads)) for output in routed]).sum()
        total = task
        if self.alpha:
            total = total + self.alpha * penalty
        if self.beta:
            total = total + self.beta * balance
        return Terms(total, task, penalty, balance)

    def after_step(self, model: SRMoE) -> None:
        if self.spec.spectral:
            terms.after_step(self.config, model.router_weights())

    def after_epoch(self, model: SRMoE, routed: Tensor, optimizer: torch.optim.Optimizer) -> int:
        return terms.after_epoch(self.config, model.router_weights(), routed, optimizer) if self.spec.spectral else 0


class Trained(NamedTuple):
    model: SRMoE
    objective: Objective
    history: list[dict[str, Any]]


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on CUDA; plain float32 on the CPU, where results must repeat exactly."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def to_layout(images: Tensor) -> Tensor:
    """channels_last: what tensor cores want, and faster on the CPU too."""
    return images.contiguous(memory_format=torch.channels_last)


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
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device)
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
    step = torch.compile(forward) if config.compile else forward
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
    return objective(model, logits, routed, labels), (logits.argmax(-1) == labels).sum()


def _train_epoch(
    config: Config,
    step: Callable[..., tuple[Terms, Tensor]],
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
    loss, task, penalty, balance, right = (sums / len(batches)).tolist()
    return {"loss": loss, "task": task, "penalty": penalty, "balance": balance, "train_accuracy": 100 * right}


def train_step(
    step: Callable[..., tuple[Terms, Tensor]],
    model: SRMoE,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """One update. The terms of equation 7 before it, and the share of images that were right, (5,)."""
    with mixed_precision(images.device):
        parts, correct = step(model, objective, images, labels)
    optimizer.zero_grad(set_to_none=True)
    parts.total.backward()
    optimizer.step()
    objective.after_step(model)
    return torch.stack([*parts, correct / len(labels)]).detach()


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


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent, from an exact count. Logits that are NaN or infinite are never right, whatever argmax makes of them."""
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return 100 * int(right.sum()) / len(labels)


@torch.no_grad()
def spectra(model: SRMoE) -> dict[str, list[float]]:
    """Spectral norm and stable rank of each layer's router weight."""
    weights = torch.stack(model.router_weights())
    return {"spectral_norm": spectral_norm(weights).tolist(), "stable_rank": stable_rank(weights).tolist()}
