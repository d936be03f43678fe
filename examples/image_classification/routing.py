"""Which way the test images take through the experts. A path is the winning (argmax) expert of each layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectral_router.functional import load_balance_loss

SHUFFLES = 100


def measure(probs: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """probs (n, L, K) and labels (n,) of the test images -> the figures of 4.2, experts counted from 1.

    The mutual information of class and path is divided by the entropy of the class: 1 means that the path tells the class.
    With many paths and few images it is above 0 by chance, by `mutual_information_chance`: the mean over 100 shuffles.
    """
    probs, labels = probs.cpu().double(), labels.cpu()
    images, layers, experts = probs.shape
    winners = probs.argmax(-1)
    taken, path = winners.unique(dim=0, return_inverse=True)
    names = ["-".join(str(expert + 1) for expert in row) for row in taken.tolist()]
    counts = _joint(labels, path, len(classes), len(names))  # (classes, paths)
    share = counts.sum(0) / images
    generator = torch.Generator().manual_seed(0)
    chance = [
        _information(_joint(labels[torch.randperm(images, generator=generator)], path, len(classes), len(names)))
        for _ in range(SHUFFLES)
    ]
    by_expert = torch.stack([_joint(labels, winners[:, layer], len(classes), experts) for layer in range(layers)])
    entropy = -(probs * probs.clamp_min(1e-300).log()).sum(-1).mean(0)
    dominant = {
        name: {"path": names[int(row.argmax())], "share": float(row.max() / row.sum())}
        for name, row in zip(classes, counts, strict=True)
    }
    found = {
        "paths_used": len(names),
        "paths_used_1pct": int((share >= 0.01).sum()),
        "top_path_share": float(share.max()),
        "class_paths": dominant,
        "dominant_paths": len({entry["path"] for entry in dominant.values()}),
        "mutual_information": _information(counts),
        "mutual_information_chance": sum(chance) / len(chance),
        "path_counts": {name: counts[:, index].long().tolist() for index, name in enumerate(names)},
        # (L, K, classes): share of each class's images that the expert wins
        "expert_share": (by_expert / counts.sum(1, keepdim=True)).mT.tolist(),
        # CV^2 per layer of what the experts get: mean probability (equation 6), and number of images won
        "importance_cv2": [float(load_balance_loss(probs[:, layer])) for layer in range(layers)],
        "load_cv2": [float(load_balance_loss(won.sum(0))) for won in by_expert],
        # per layer, divided by log K: 1 is an even mixture of all experts, 0 a hard choice
        "entropy": (entropy / torch.tensor(max(experts, 2)).double().log()).tolist(),
    }
    if probs.isfinite().all():
        return found
    # where a router gives no numbers, argmax takes its first expert for every image: no path, and no share of one, is told
    nowhere = {name: {"path": "none", "share": math.nan} for name in classes}
    numbers = (name for name, value in found.items() if not isinstance(value, list | dict))
    return found | dict.fromkeys(numbers, math.nan) | {"class_paths": nowhere}


def _joint(labels: Tensor, groups: Tensor, rows: int, columns: int) -> Tensor:
    """How often each label meets each group, (rows, columns)."""
    return torch.bincount(labels * columns + groups, minlength=rows * columns).view(rows, columns).double()


def _information(counts: Tensor) -> float:
    """Mutual information of the two sides of a count table over the entropy of its rows, in [0, 1]."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    information = torch.special.xlogy(joint, joint).sum() - torch.special.xlogy(joint, rows * columns).sum()
    entropy = -torch.special.xlogy(rows, rows).sum()
    return max(0.0, float(information / entropy))
