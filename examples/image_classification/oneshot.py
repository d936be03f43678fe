"""The one-shot adaptation test of section 4.3.

For every novel image: a fresh copy of the trained model, one update on [novel image ; anchor batch] with equation 7, then
the accuracy on the whole test set. Beside the paper's accuracy delta (interference) this reports whether the novel image
was learned (plasticity): an update that changes nothing has a perfect delta of 0.

The paper leaves open which weights are updated (`--scope`), by which optimizer and at what rate. Batch norm stays in eval
mode: its statistics belong to the training set, and 17 images would distort them for every router alike.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_router import ExpertPath, surgical

from .config import Config
from .data import ImageSet, Split, as_float, to_layout
from .evaluate import accuracy, predict, right
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
    loss_before, right_before = _novel(model, images, labels)
    experts = [list(layer.experts.parameters()) for layer in model.moe_layers]
    # of one expert there is one path
    scope = "experts" if config.scope == "path" and config.experts == 1 else config.scope
    if scope == "experts":
        model.requires_grad_(False)
        for parameters in experts:
            for parameter in parameters:
                parameter.requires_grad_(True)
    gradient = _Norms(experts)
    with _path(model, images) if scope == "path" else contextlib.nullcontext():
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = torch.optim.Adam if config.oneshot_optimizer == "adam" else torch.optim.SGD
        optimizer = kind(trainable, lr=config.oneshot_lr)
        for _ in range(config.oneshot_steps):
            with mixed_precision(images.device):
                logits, routed = model(to_layout(as_float(images)))
                terms = objective(model, logits, routed, labels)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            objective.after_step(model)
    loss_after, right_after = _novel(model, images, labels)
    return {
        "loss_before": float(loss_before),
        "loss_after": float(loss_after),
        "right_before": bool(right_before),
        "right_after": bool(right_after),
        "gradient": gradient.first(),
    }


def _path(model: SRMoE, images: Tensor) -> AbstractContextManager[ExpertPath]:
    """Only the winning experts of the first image can change: section 3.3."""
    with mixed_precision(images.device):
        return surgical(model, to_layout(as_float(images[:1])), top=1, by="weights")


def _novel(model: SRMoE, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the novel image, and whether it is classified rightly."""
    logits, _ = predict(model, images[:1])
    return F.cross_entropy(logits, labels[:1]), right(logits, labels[:1])[0]


class _Norms:
    """The gradient of the first backward at every expert, seen before the path leaves some of it out."""

    def __init__(self, experts: list[list[torch.nn.Parameter]]) -> None:
        self.squares: list[list[Tensor | None]] = [[None] * len(parameters) for parameters in experts]
        self.hooks = [
            parameter.register_hook(partial(self._note, layer, number))
            for layer, parameters in enumerate(experts)
            for number, parameter in enumerate(parameters)
        ]

    def _note(self, layer: int, number: int, gradient: Tensor) -> None:
        if self.squares[layer][number] is None:
            self.squares[layer][number] = gradient.float().square().sum((1, 2))

    def first(self) -> list[list[float]]:
        """Its norm over all of an expert's parameters, (L, K)."""
        for hook in self.hooks:
            hook.remove()
        norms = []
        for of_layer in self.squares:
            squares = [square for square in of_layer if square is not None]
            assert len(squares) == len(of_layer)
            norms.append(torch.stack(squares).sum(0).sqrt())
        return torch.stack(norms).tolist()


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
