"""The split: few images to train on, validation images that are the same for all seeds, the rest to test on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.shared.command import ExperimentError

from .config import Config


class Split(NamedTuple):
    """Indices (n,) int64. No image is in two of them, and no validation image in another part of any seed."""

    train: Tensor
    val: Tensor
    test: Tensor


def split(labels: Tensor, classes: list[str], config: Config, seed: int) -> Split:
    always, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    least = config.train_per_class + config.val_per_class + 1
    parts: list[list[Tensor]] = [[], [], []]
    for label, name in enumerate(classes):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < least:
            raise ExperimentError(
                f"every class needs at least {least} images ({config.train_per_class} to train on, {config.val_per_class} to "
                f"choose by, one to test on), got {len(members)} in class {name!r}; add images, or lower --train-per-class or "
                "--val-per-class"
            )
        members = members[torch.randperm(len(members), generator=always)]
        val, rest = members[: config.val_per_class], members[config.val_per_class :]
        rest = rest[torch.randperm(len(rest), generator=drawn)]
        chosen = (rest[: config.train_per_class], val, rest[config.train_per_class :])
        for part, indices in zip(parts, chosen, strict=True):
            part.append(indices)
    return Split(*(torch.cat(part) for part in parts))
