"""The one-shot test of `oneshot.adapt` for one step and many update rules, on many copies of the model at once.

Before the update all copies are one model: what an image gives then, its gradient included, is found once for all rules.
Where only experts change, nothing before those of the first layer does: every image goes through the stem once, and the
experts of the copies are stacked and run as batched matmuls, gradients and updates included. Both optimizers work element by
element, so that one optimizer of the stack is one optimizer for each copy.

Shapes: C copies, n images for each, B of them in an update, d width, h hidden width, K experts, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split, as_float, to_layout
from examples.image_classification.evaluate import in_batches, right
from examples.image_classification.model import SRMoE, mixed_precision
from examples.image_classification.objective import Objective
from examples.image_classification.oneshot import Record, update_batch
from examples.image_classification.train import Trained
from examples.shared.command import ExperimentError
from spectral_router import RouterOutput

from .rule import Rule
from .stack import Stack

# Copies updated together, pairs of copy and image in one forward: on a CPU what its cache holds.
COPIES = {"cpu": 8, "cuda": 64}
PAIRS = {"cpu": 1 << 10, "cuda": 1 << 16}


class Entry(NamedTuple):
    """Images at the experts of the first layer, which is as far as all copies agree."""

    z: Tensor  # (*, d), what the layer gets
    inside: Tensor  # (*, d), what its experts get
    weights: Tensor  # (*, K)

    def first(self) -> Entry:
        """Of updates (C, B, *) the novel images, (C, 1, *)."""
        return Entry(*(tensor[:, :1] for tensor in self))


class Start(NamedTuple):
    """Novel images before their update."""

    loss: Tensor  # (C,)
    right: Tensor  # (C,)
    path: list[Tensor]  # winner of each layer (C,)
    gradient: list[Stack]


class Found(NamedTuple):
    """Novel images after their update, (C,) each."""

    loss: Tensor
    right: Tensor
    hits: Tensor  # how many of the held-out images are right


def adapt_stacked(
    config: Config,
    seed: int,
    trained: Trained,
    data: ImageSet,
    split: Split,
    rules: Sequence[Rule],
    within: str = "test",
) -> list[list[Record]]:
    """For each rule the records of all novel images, as `oneshot.adapt` saves them. `within`: "test" or "val", the images
    that the accuracy is measured on."""
    if config.oneshot_steps != 1:
        raise ExperimentError(f"--oneshot-steps must be 1 for stacked copies, got {config.oneshot_steps}; use oneshot.adapt")
    for rule in rules:
        replace(config, scope=rule.scope, oneshot_optimizer=rule.optimizer, oneshot_lr=rule.lr).validate()
    device = data.images.device
    held_out = getattr(split, within).to(device)
    labels = data.labels[held_out]
    images = in_batches(to_layout(as_float(data.images[held_out])))
    novel = [(label, number) for label, numbers in enumerate(split.novel) for number in range(len(numbers))]
    batches = torch.stack([update_batch(config, seed, split, *which) for which in novel]).to(device)

    model = copy.deepcopy(trained.model).eval().requires_grad_(False)
    stacks = _stacks(model)
    entry = _entry(model, images)
    flat = _entry(model, in_batches(to_layout(as_float(data.images[batches.flatten()]))))
    updates = Entry(*(tensor.unflatten(0, batches.shape) for tensor in flat))
    before = _right(model, entry, stacks, labels)
    starts: list[tuple[Tensor, ...]] = []
    found: list[list[Found]] = [[] for _ in rules]
    for part in _parts(len(batches), COPIES[device.type]):
        targets = data.labels[batches[part]]
        update = Entry(*(tensor[part] for tensor in updates))
        start = _start(model, trained.objective, update, stacks, targets)
        starts.append((start.loss, start.right, torch.stack([gradient.norms() for gradient in start.gradient], 1)))
        for rule, columns in zip(rules, found, strict=True):
            if rule.scope != "all":
                after = _updated(rule, stacks, start)
                columns.append(_after(model, update.first(), targets[:, 0], entry, after, labels))
    everything = [(rule, columns) for rule, columns in zip(rules, found, strict=True) if rule.scope == "all"]
    _everything(trained, data, batches, images, labels, everything)

    def percent(hits: int) -> float:
        return 100 * hits / len(labels)

    # all that waits for the device
    loss, right_before, norms = (torch.cat(column).tolist() for column in zip(*starts, strict=True))
    hits_before = int(before)
    records = []
    for columns in found:
        loss_after, right_after, hits = (torch.cat(column).tolist() for column in zip(*columns, strict=True))
        records.append(
            [
                {
                    "class": data.classes[label],
                    "image": number,
                    "delta": percent(hits[i]) - percent(hits_before),
                    "loss_before": loss[i],
                    "loss_after": loss_after[i],
                    "right_before": right_before[i],
                    "right_after": right_after[i],
                    "gradient": norms[i],
                }
                for i, (label, number) in enumerate(novel)
            ]
        )
    return records


def _everything(
    trained: Trained,
    data: ImageSet,
    batches: Tensor,
    held_out: Sequence[Tensor],
    labels: Tensor,
    wanted: list[tuple[Rule, list[Found]]],
) -> None:
    """Scope "all": one model, set back after every update. What each rule does to each novel image goes to the rule's list."""
    model = copy.deepcopy(trained.model).eval()
    parameters: list[Tensor] = list(model.parameters())
    originals = [parameter.detach().clone() for parameter in parameters]
    for batch in batches if wanted else []:
        images, targets = to_layout(as_float(data.images[batch])), data.labels[batch]
        objective = copy.deepcopy(trained.objective)
        objective.measure = False
        with mixed_precision(targets.device):
            logits, routed = model(images)
            total = objective(model, logits, routed, targets).total
        gradient = torch.autograd.grad(total, parameters, allow_unused=True)
        for rule, columns in wanted:
            _step(rule, parameters, gradient)
            objective.after_step(model)
            novel = Entry(*(tensor[None] for tensor in _entry(model, [images[:1]])))
            columns.append(_after(model, novel, targets[:1], _entry(model, held_out), _stacks(model), labels))
            with torch.no_grad():
                torch._foreach_copy_(parameters, originals)


def _start(model: SRMoE, objective: Objective, update: Entry, stacks: list[Stack], labels: Tensor) -> Start:
    """update (C, B, *), labels (C, B), the novel image first; the gradients of all copies in one backward."""
    leaves = [Stack(*(tensor.expand(len(labels), -1, -1).requires_grad_() for tensor in stack)) for stack in stacks]
    logits, routed = _forward(model, update, leaves)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    total = losses.mean(1).sum()  # without the penalty and the first layer's balance: they do not depend on experts
    if objective.beta:
        with mixed_precision(labels.device):
            read = [of_copy for output in routed for of_copy in getattr(output, objective.reads)]
            total = total + objective.beta * sum(objective.balance(of_copy) for of_copy in read)
    flat = torch.autograd.grad(total, [tensor for stack in leaves for tensor in stack])
    path = [weights[:, 0].argmax(-1) for weights in (update.weights, *(output.weights for output in routed))]
    gradient = [Stack(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
    return Start(losses[:, 0].detach(), right(logits[:, 0], labels[:, 0]), path, gradient)


def _updated(rule: Rule, stacks: list[Stack], start: Start) -> list[Stack]:
    """The experts of all copies after a step by `rule`, whose scope is "experts" or "path"."""
    copies = len(start.loss)
    after = [Stack(*(tensor.repeat(copies, 1, 1) for tensor in stack)) for stack in stacks]
    gradient = start.gradient
    if rule.scope == "path":
        gradient = [of_layer.only(winner) for winner, of_layer in zip(start.path, gradient, strict=True)]
    _step(rule, [tensor for stack in after for tensor in stack], [tensor for stack in gradient for tensor in stack])
    return after


@torch.no_grad()
def _after(model: SRMoE, novel: Entry, labels: Tensor, held_out: Entry, stacks: list[Stack], held_out_labels: Tensor) -> Found:
    """novel (C, 1, *), labels (C,), held_out (n, *)."""
    logits = _forward(model, novel, stacks)[0][:, 0]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return Found(loss, right(logits, labels), _right(model, held_out, stacks, held_out_labels))


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _stacks(model: SRMoE) -> list[Stack]:
    return [Stack.of(layer.experts) for layer in model.moe_layers]


@torch.no_grad()
def _entry(model: SRMoE, batches: Sequence[Tensor]) -> Entry:
    """Images (n, C, H, W) float, in batches, up to the first layer's experts; (n, *)."""
    first = model.moe_layers[0]
    parts = []
    for batch in batches:
        with mixed_precision(batch.device):
            parts.append(model.stem(batch))
    z = torch.cat(parts)
    with mixed_precision(z.device):
        inside = first.processor(z)
        return Entry(z, inside, first.router(inside).weights)


def _forward(model: SRMoE, entry: Entry, stacks: list[Stack]) -> tuple[Tensor, list[RouterOutput]]:
    """The network from the first layer's experts on: logits (C, n, classes) float32, what the later layers' routers say."""
    routed: list[RouterOutput] = []
    z, inside, weights = entry
    with mixed_precision(z.device):
        for number, (layer, stack) in enumerate(zip(model.moe_layers, stacks, strict=True)):
            if number:
                inside = layer.processor(z)
                routed.append(layer.router(inside))
                weights = routed[-1].weights
            mixed = stack(inside, weights)
            z = z + mixed if layer.residual else mixed
        return model.head(z).float(), routed


@torch.no_grad()
def _right(model: SRMoE, held_out: Entry, stacks: list[Stack], labels: Tensor) -> Tensor:
    """How many of the held-out images (n, *) each copy gets right, (C,)."""
    pairs = PAIRS[labels.device.type]
    counts = []
    for part in _parts(len(stacks[0].w_in), max(1, pairs // len(labels))):
        some = [Stack(*(tensor[part] for tensor in stack)) for stack in stacks]
        hits = []
        for rows in _parts(len(labels), pairs):
            logits, _ = _forward(model, Entry(*(tensor[None, rows] for tensor in held_out)), some)
            hits.append(right(logits, labels[rows]))
        counts.append(torch.cat(hits, 1).sum(1))
    return torch.cat(counts)


def _step(rule: Rule, parameters: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
    for parameter, own in zip(parameters, gradient, strict=True):
        parameter.grad = own
    kind = torch.optim.Adam if rule.optimizer == "adam" else torch.optim.SGD
    kind(parameters, lr=rule.lr, fused=True).step()
