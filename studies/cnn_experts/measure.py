"""What a trained network does with the test images, and what it costs."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from examples.image_classification import routing
from examples.image_classification.data import as_float, to_layout
from examples.image_classification.evaluate import accuracy
from spectral_router.functional import load_balance_loss

from .model import Network, Routed, parameters
from .train import predict

USED = 0.01  # an expert counts as used from this share of the images on
SHOWN = 1000  # images in the picture of the gate's scores
PROBE = 64  # images that the multiply-adds are counted on


@torch.no_grad()
def cost(network: Network, images: Tensor) -> dict[str, float]:
    """Parameters, and multiply-adds an image of the convolutions and linear maps, in evaluation."""
    probe = images[:PROBE]
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(to_layout(as_float(probe)))
    return {"parameters": parameters(network), "multiply_adds": counter.get_total_flops() / 2 / len(probe)}


def measure(network: Network, images: Tensor, labels: Tensor, classes: list[str], *, picture: bool) -> dict[str, Any]:
    """Accuracy of the network, and for a mixture the figures of its gate and of its experts, one by one; `picture`: with the
    scores of single images."""
    logits, routed = predict(network, images)
    part: dict[str, Any] = {"accuracy": accuracy(logits, labels)}
    if routed is None:
        return part
    experts = routed.weights.shape[-1]
    alone = [predict(network, images, expert)[0] for expert in range(experts)]
    part |= {
        "routing": of_gate(routed.weights, labels, classes),
        "fixed_expert": fixed(alone, labels),
        "own_images": own_images(logits, routed.weights, labels),
    }
    return part | ({"gate": gate_scores(routed, labels)} if picture else {})


def of_gate(weights: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """weights (n, K), zero where not chosen -> importance (sum of weights), load (images sent), and how both go by class."""
    weights, labels = weights.cpu().double(), labels.cpu()
    load = (weights > 0).double().mean(0)
    by_class = torch.stack([weights[labels == label].mean(0) for label in range(len(classes))])
    known = routing.measure(weights[:, None], labels, classes)
    found = {
        "class_weights": by_class.tolist(),  # (classes, K): mean weight
        "load": load.tolist(),
        "experts_used": int((load >= USED).sum()),
        "importance_cv2": known["importance_cv2"][0],
        "load_cv2": float(load_balance_loss(load[None])),
        # purity: each expert's largest class, as a share of all weight; the classes are equally frequent
        "purity": float(by_class.amax(0).sum() / len(classes)),
        "mutual_information": known["mutual_information"],
        "mutual_information_chance": known["mutual_information_chance"],
    }
    if weights.isfinite().all():
        return found
    # a diverged gate chooses nothing: its load would be an even one, of zeros
    return found | {name: math.nan for name, value in found.items() if not isinstance(value, list)}


def fixed(alone: list[Tensor], labels: Tensor) -> dict[str, Any]:
    """Accuracy with all the weight on one expert, for each, in percent."""
    each = [accuracy(logits, labels) for logits in alone]
    return {"each": each, "best": max(each), "mean": sum(each) / len(each), "worst": min(each)}


def own_images(logits: Tensor, weights: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy of the whole network on the images where an expert has the largest weight; None for one with too few."""
    # a diverged gate, of no numbers, sends no image anywhere
    winner = torch.where(weights.isfinite().all(-1), weights.argmax(-1), -1)
    masks = [winner == expert for expert in range(weights.shape[-1])]
    shares = [float(mask.float().mean()) for mask in masks]
    return {
        "share": shares,
        "accuracy": [
            accuracy(logits[mask], labels[mask]) if share >= USED else None for mask, share in zip(masks, shares, strict=True)
        ],
    }


def constrained(history: list[dict[str, Any]]) -> dict[str, float]:
    """How often a hard constraint acted, over the whole training; every epoch has as many steps."""
    closed = [sum(row["closed"]) / len(row["closed"]) for row in history]
    return {
        "closed": 100 * sum(closed) / len(closed),  # percent of experts times steps
        "steps_with_closed": 100 * sum(row["steps_with_closed"] for row in history) / len(history),
        "largest_excess": max(row["excess"] for row in history),
    }


def gate_scores(routed: Routed, labels: Tensor) -> dict[str, Any]:
    """Scores (rounded), labels and winners of at most `SHOWN` images, evenly picked."""
    picked = torch.linspace(0, len(labels) - 1, min(SHOWN, len(labels)), device=labels.device).round().long()
    return {
        "scores": [[round(value, 4) for value in row] for row in routed.scores[picked].tolist()],
        "labels": labels[picked].tolist(),
        "winners": routed.weights[picked].argmax(-1).tolist(),
    }


def scalars(part: dict[str, Any]) -> dict[str, float | None]:
    """Every number of a run that is averaged over seeds."""
    found: dict[str, float | None] = {name: part[name] for name in ("accuracy", "parameters", "multiply_adds")}
    if "routing" not in part:
        return found
    found |= {name: value for name, value in part["routing"].items() if not isinstance(value, list)}
    found |= {f"fixed_{name}": part["fixed_expert"][name] for name in ("best", "mean", "worst")}
    # an expert that was never trained is not a specialist
    alone = zip(part["fixed_expert"]["each"], part["routing"]["load"], strict=True)
    used = [accurate for accurate, share in alone if share >= USED]
    found["fixed_used"] = fmean(used) if used else None
    known = [value for value in part["own_images"]["accuracy"] if value is not None]
    found |= {"own_best": max(known, default=None), "own_worst": min(known, default=None)}
    return found | part.get("constraint", {})
