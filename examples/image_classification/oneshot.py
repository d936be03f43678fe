"""The one-shot adaptation test of section 4.3.

For every novel image: a fresh copy of the trained model, one update on [novel image ; anchor batch] with equation 7, then
the accuracy on the whole test set. Beside the paper's accuracy delta (interference) this reports whether the novel image
was learned (plasticity): an update that changes nothing has a perfect delta of 0.

The paper leaves open which weights are updated (`--scope`), by which optimizer and at what rate. Batch norm stays in eval
mode: its statistics belong to the training set, and 17 images would distort them for every router alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config
from .data import ImageSet, Split, as_float, to_layout
from .evaluate import accuracy, predict
from .model import SRMoE, mixed_precision
from .objective import Objective
from .train import Trained

Record = dict[str, Any]


def adapt(
    config: Config,
    seed: int,
    trained: Trained,
    data: ImageSet,
    split: Split,
    done: list[Record],
    save: Callable[[Record], None],
) -> None:
    """Run the test for every novel image that is not in `done` yet; hand each result to `save`."""
    device = data.images.device
    test = split.test.to(device)
    test_images, test_labels = data.images[test], data.labels[test]
    before = accuracy(predict(trained.model, test_images)[0], test_labels)
    finished = {(record["class"], record["image"]) for record in done}
    for label, images in enumerate(split.novel):
        for number in range(len(images)):
            if (data.classes[label], number) in finished:
                continue
            batch = update_batch(config, seed, split, label, number).to(device)
            model = copy.deepcopy(trained.model).eval()
            objective = copy.deepcopy(trained.objective)
            record = _update(config, model, objective, data.images[batch], data.labels[batch])
            after = accuracy(predict(model, test_images)[0], test_labels)
            save({"class": data.classes[label], "image": number, "delta": after - before, **record})


def update_batch(config: Config, seed: int, split: Split, label: int, number: int) -> Tensor:
    """Indices of a novel image and its anchors (1 + anchors,): the same for every router."""
    generator = torch.Generator().manual_seed((seed * len(split.novel) + label) * config.novel + number)
    anchors = split.train[torch.randperm(len(split.train), generator=generator)[: config.anchor]]
    return torch.cat([split.novel[label, number, None], anchors])


def _update(config: Config, model: SRMoE, objective: Objective, images: Tensor, labels: Tensor) -> Record:
    """Update `model` in place. The first of the images, (1 + anchors, C, H, W) uint8, is the novel one."""
    loss_before, right_before, path = _novel(model, images, labels)
    experts = [list(layer.experts.parameters()) for layer in model.moe_layers]
    if config.scope != "all":
        model.requires_grad_(False)
        for parameters in experts:
            for parameter in parameters:
                parameter.requires_grad_(True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = torch.optim.Adam if config.oneshot_optimizer == "adam" else torch.optim.SGD
    optimizer = kind(trainable, lr=config.oneshot_lr)
    first_gradient: Tensor | None = None
    for _ in range(config.oneshot_steps):
        with mixed_precision(images.device):
            logits, routed = model(to_layout(as_float(images)))
            terms = objective(model, logits, routed, labels)
        optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        if first_gradient is None:
            first_gradient = torch.stack([_norm_per_expert(parameters) for parameters in experts])
        if config.scope == "path":
            # an expert without gradient is not moved: both optimizers start without momentum and have no weight decay
            for parameters, winner in zip(experts, path, strict=True):
                for parameter in parameters:
                    keep = torch.arange(len(parameter), device=parameter.device) == winner
                    assert parameter.grad is not None
                    parameter.grad *= keep.view(-1, 1, 1)
        optimizer.step()
        objective.after_step(model)
    assert first_gradient is not None
    loss_after, right_after, _ = _novel(model, images, labels)
    return {
        "loss_before": float(loss_before),
        "loss_after": float(loss_after),
        "right_before": bool(right_before),
        "right_after": bool(right_after),
        "gradient": first_gradient.tolist(),
    }


def _novel(model: SRMoE, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the novel image, whether it is classified rightly, and its winning expert in each layer (L,)."""
    logits, weights = predict(model, images[:1])
    return F.cross_entropy(logits, labels[:1]), logits.argmax(-1)[0] == labels[0], weights[0].argmax(-1)


def _norm_per_expert(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Norm of the loss gradient of each of the K experts of a layer (K,), over all of the expert's parameters."""
    squares = []
    for parameter in parameters:
        assert parameter.grad is not None
        squares.append(parameter.grad.float().square().sum((1, 2)))
    return torch.stack(squares).sum(0).sqrt()


def summarize(records: list[Record], classes: list[str]) -> dict[str, Any]:
    """Means over the novel images: delta in points per class and over all, plasticity, gradient norms (L, K)."""

    def mean(key: str, within: list[Record]) -> float:
        return sum(record[key] for record in within) / len(within)

    by_class = {name: [record for record in records if record["class"] == name] for name in classes}
    deltas = {name: mean("delta", within) for name, within in by_class.items()}
    return {
        "delta": deltas,
        "mean_delta": sum(deltas.values()) / len(deltas),
        "novel_loss_before": mean("loss_before", records),
        "novel_loss_after": mean("loss_after", records),
        "novel_accuracy_before": 100 * mean("right_before", records),
        "novel_accuracy_after": 100 * mean("right_after", records),
        "gradient_norm": torch.tensor([record["gradient"] for record in records], dtype=torch.float64).mean(0).tolist(),
    }
