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

from examples.shared.command import ExperimentError
from spectral_router import RouterOutput

from .config import Config
from .data import ImageSet, Split, as_float
from .model import Experts, SRMoE
from .oneshot import Record, update_batch
from .train import EVAL_BATCH, Objective, Trained, mixed_precision, to_layout

# copies that are updated together, and pairs of copy and image in one forward: on a CPU what its cache holds
COPIES = {"cpu": 8, "cuda": 64}
PAIRS = {"cpu": 512, "cuda": 1 << 16}


class Rule(NamedTuple):
    """How a one-shot update is made; as --scope, --oneshot-optimizer and --oneshot-lr."""

    scope: str
    optimizer: str
    lr: float


class Stack(NamedTuple):
    """One layer's experts of C copies, those of a copy side by side: two matmuls run them all."""

    w_in: Tensor  # (C, d, K h)
    b_in: Tensor  # (C, 1, K h)
    w_out: Tensor  # (C, K h, d)
    b_out: Tensor  # (C, K, d)

    @classmethod
    def of(cls, experts: Experts) -> Stack:
        """A single copy, C = 1."""
        w_in, b_in, w_out, b_out = (parameter.detach() for parameter in experts.parameters())
        return cls(w_in.transpose(0, 1).flatten(1)[None], b_in.view(1, 1, -1), w_out.flatten(0, 1)[None], b_out[:, 0][None])

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (C or 1, n, d), weights (C or 1, n, K) -> equation 1, (C, n, d): `Experts.forward`, weighted before w_out."""
        copies, experts, _ = self.b_out.shape
        inside = torch.baddbmm(self.b_in, x.expand(copies, -1, -1), self.w_in).relu_()
        weights = weights.to(inside.dtype).expand(copies, -1, -1)
        inside = (inside.unflatten(-1, (experts, -1)) * weights[..., None]).flatten(-2)
        return torch.baddbmm(torch.bmm(weights, self.b_out.to(weights.dtype)), inside, self.w_out)


class Entry(NamedTuple):
    """Images at the experts of the first layer, which is as far as all copies agree."""

    z: Tensor  # (*, d), what the layer gets
    inside: Tensor  # (*, d), what its experts get
    weights: Tensor  # (*, K)


class Found(NamedTuple):
    """Of each novel image, in order: loss and correctness after the update, and how many images are right then, (N,) each."""

    loss: Tensor
    right: Tensor
    count: Tensor


class Start(NamedTuple):
    """Of each novel image before the update: loss and correctness (N,), norms of its gradient (N, L, K)."""

    loss: Tensor
    right: Tensor
    norms: Tensor


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
    images, labels = data.images[held_out], data.labels[held_out]
    novel = [(label, number) for label, numbers in enumerate(split.novel) for number in range(len(numbers))]
    batches = torch.stack([update_batch(config, seed, split, *which) for which in novel]).to(device)
    everything = [rule for rule in rules if rule.scope == "all"]
    some = [rule for rule in rules if rule.scope != "all"]
    start, before, found_some = _experts(trained, data, batches, images, labels, some)
    found = dict(zip(some, found_some, strict=True))
    if everything:
        before_all, found_all = _everything(trained, data, batches, images, labels, everything)
        found |= dict(zip(everything, found_all, strict=True))

    def percent(count: int) -> float:
        return 100 * count / len(labels)

    known = [tensor.tolist() for tensor in start]
    records = []
    for rule in rules:
        first = percent(int(before_all if rule.scope == "all" else before))
        loss, right, count = (tensor.tolist() for tensor in found[rule])
        records.append(
            [
                {
                    "class": data.classes[label],
                    "image": number,
                    "delta": percent(count[i]) - first,
                    "loss_before": known[0][i],
                    "loss_after": loss[i],
                    "right_before": known[1][i],
                    "right_after": right[i],
                    "gradient": known[2][i],
                }
                for i, (label, number) in enumerate(novel)
            ]
        )
    return records


def _everything(
    trained: Trained, data: ImageSet, batches: Tensor, images: Tensor, labels: Tensor, rules: list[Rule]
) -> tuple[Tensor, list[Found]]:
    """Scope "all": one model, set back before every update. How many images are right before, and what each rule does."""
    model = copy.deepcopy(trained.model).eval()
    parameters = list(model.parameters())
    originals = [parameter.detach().clone() for parameter in parameters]
    held_out = [to_layout(as_float(batch)) for batch in images.split(EVAL_BATCH)]
    before = _count(_logits(model, held_out), labels)
    found: list[list[list[Tensor]]] = [[[], [], []] for _ in rules]
    for batch in batches:
        novel, label = to_layout(as_float(data.images[batch])), data.labels[batch]
        objective = copy.deepcopy(trained.objective)
        objective.measure = False
        with mixed_precision(novel.device):
            logits, routed = model(novel)
            total = objective(model, logits, routed, label).total
        gradient = torch.autograd.grad(total, parameters, allow_unused=True)
        for rule, columns in zip(rules, found, strict=True):
            _step(rule, parameters, gradient)
            objective.after_step(model)
            after = _logits(model, [novel[:1]])
            columns[0].append(F.cross_entropy(after, label[:1]))
            columns[1].append(after.argmax(-1)[0] == label[0])
            columns[2].append(_count(_logits(model, held_out), labels))
            with torch.no_grad():
                torch._foreach_copy_(parameters, originals)
    return before, [Found(*map(torch.stack, columns)) for columns in found]


def _experts(
    trained: Trained, data: ImageSet, batches: Tensor, images: Tensor, labels: Tensor, rules: list[Rule]
) -> tuple[Start, Tensor, list[Found]]:
    """What the novel images give before an update, how many images are right then, and what each rule of scope "experts" or
    "path" does."""
    model = copy.deepcopy(trained.model).eval().requires_grad_(False)
    stacks = [Stack.of(layer.experts) for layer in model.moe_layers]
    held_out = _entry(model, images)
    updates = Entry(*(tensor.unflatten(0, batches.shape) for tensor in _entry(model, data.images[batches.flatten()])))
    before = _right(model, held_out, stacks, labels)[0]
    starts: list[Start] = []
    found: list[list[Found]] = [[] for _ in rules]
    for chunk in torch.arange(len(batches)).split(COPIES[labels.device.type]):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        entry = Entry(*(tensor[part] for tensor in updates))
        novel = Entry(*(tensor[:, :1] for tensor in entry))
        targets = data.labels[batches[part]]
        start, path, gradient = _gradients(model, trained.objective, entry, stacks, targets)
        starts.append(start)
        for rule, columns in zip(rules, found, strict=True):
            after = [Stack(*(tensor.repeat(len(targets), 1, 1) for tensor in stack)) for stack in stacks]
            used = _only(path, gradient) if rule.scope == "path" else gradient
            _step(rule, [tensor for stack in after for tensor in stack], [tensor for stack in used for tensor in stack])
            logits = _forward(model, novel, after)[0][:, 0]
            loss = F.cross_entropy(logits, targets[:, 0], reduction="none")
            columns.append(Found(loss, logits.argmax(-1) == targets[:, 0], _right(model, held_out, after, labels)))
    return Start(*map(torch.cat, zip(*starts))), before, [Found(*map(torch.cat, zip(*columns))) for columns in found]


def _gradients(
    model: SRMoE, objective: Objective, entry: Entry, stacks: list[Stack], labels: Tensor
) -> tuple[Start, list[Tensor], list[Stack]]:
    """entry (C, B, *), labels (C, B) -> the novel images before the update, the winner of each layer (C,), the gradients."""
    leaves = [Stack(*(tensor.expand(len(labels), -1, -1).requires_grad_() for tensor in stack)) for stack in stacks]
    with torch.enable_grad():
        logits, routed = _forward(model, entry, leaves)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        total = losses.mean(1).sum()  # of all copies; the penalty and the first layer's balance do not depend on experts
        if objective.beta:
            with mixed_precision(labels.device):
                read = [one for output in routed for one in getattr(output, objective.reads)]
                total = total + objective.beta * sum(objective.balance(one) for one in read)
        flat = torch.autograd.grad(total, [tensor for stack in leaves for tensor in stack])
    gradient = [Stack(*flat[i : i + 4]) for i in range(0, len(flat), 4)]
    path = [weights[:, 0].argmax(-1) for weights in (entry.weights, *(output.weights for output in routed))]
    novel = logits[:, 0].detach()
    start = Start(losses[:, 0].detach(), novel.argmax(-1) == labels[:, 0], torch.stack([_norms(one) for one in gradient], 1))
    return start, path, gradient


def _entry(model: SRMoE, images: Tensor) -> Entry:
    """Images (n, C, H, W) uint8 to the first layer's experts."""
    parts = []
    first = model.moe_layers[0]
    with torch.no_grad():
        for batch in images.split(EVAL_BATCH):
            with mixed_precision(images.device):
                z = model.stem(to_layout(as_float(batch)))
                inside = first.processor(z)
                parts.append(Entry(z, inside, first.router(inside).weights))
    return Entry(*map(torch.cat, zip(*parts)))


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
def _right(model: SRMoE, entry: Entry, stacks: list[Stack], labels: Tensor) -> Tensor:
    """How many images each copy gets right, (C,); entry (n, *) is the same for all."""
    pairs = PAIRS[labels.device.type]
    counts = []
    for copies in torch.arange(len(stacks[0].w_in)).split(max(1, pairs // len(labels))):
        part = slice(int(copies[0]), int(copies[-1]) + 1)
        some = [Stack(*(tensor[part] for tensor in stack)) for stack in stacks]
        rows = max(1, pairs // len(copies))
        sums = [
            _count(_forward(model, Entry(*(t[None] for t in batch[:3])), some)[0], batch[3])
            for batch in zip(*(tensor.split(rows) for tensor in (*entry, labels)), strict=True)
        ]
        counts.append(torch.stack(sums).sum(0))
    return torch.cat(counts)


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """As `train.accuracy`: logits that are not finite are never right; (*, n, classes) -> (*)"""
    return ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).sum(-1)


@torch.no_grad()
def _logits(model: SRMoE, batches: list[Tensor]) -> Tensor:
    logits = []
    for batch in batches:
        with mixed_precision(batch.device):
            logits.append(model(batch)[0].float())
    return torch.cat(logits)


def _step(rule: Rule, parameters: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
    for parameter, own in zip(parameters, gradient, strict=True):
        parameter.grad = own
    kind = torch.optim.Adam if rule.optimizer == "adam" else torch.optim.SGD
    kind(parameters, lr=rule.lr, fused=True).step()


def _only(path: list[Tensor], gradient: list[Stack]) -> list[Stack]:
    """The gradient of each layer's winning expert (C,); zero for the others, which both optimizers then leave alone."""
    kept = []
    for winner, (w_in, b_in, w_out, b_out) in zip(path, gradient, strict=True):
        keep = F.one_hot(winner, b_out.shape[1]).to(b_out.dtype)
        inside = keep.repeat_interleave(w_out.shape[1] // b_out.shape[1], dim=1)
        kept.append(Stack(w_in * inside[:, None], b_in * inside[:, None], w_out * inside[..., None], b_out * keep[..., None]))
    return kept


def _norms(gradient: Stack) -> Tensor:
    """Norm of each expert's gradient (C, K), over all of its parameters."""
    w_in, b_in, w_out, b_out = (tensor.square() for tensor in gradient)
    inside = w_in.sum(1) + b_in.sum(1) + w_out.sum(2)
    return (inside.unflatten(1, (b_out.shape[1], -1)).sum(2) + b_out.sum(2)).sqrt()
