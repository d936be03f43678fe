"""Losses and routing on the windows of validation, and what is computed from them.

Shapes: D domains, W windows of a domain, T tokens of a window, L layers, K experts, k experts chosen for a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor

from examples.shared.command import ExperimentError
from examples.shared.storage import load_checkpoint, save_checkpoint
from spectral_router import Gate, find_gates
from spectral_router.functional import load_balance_loss, spectral_norm, stable_rank

from .config import Config
from .data import Text

SHUFFLES = 20
MAPS = 20
# an expert with less than this part of an even share is dead, as in `MoEHandle.metrics`
DEAD = 0.01


@torch.no_grad()
def evaluate(model: Any, gates: Sequence[Gate], text: Text, config: Config) -> dict[str, Any]:
    """loss (D) in nats a byte, experts (D, W, T, L, k) with the heaviest first, and the spectra of the gates, (L) each."""
    device = next(model.parameters()).device
    losses = []
    training = model.training
    model.eval()
    rows = rearrange(text.validation, "d w t -> (d w) t")
    with _choices(gates) as chosen, torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        for batch in rows.split(config.batch_size):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses.append(F.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(-1))
    model.train(training)
    domains = len(text.domains)
    loss = rearrange(torch.cat(losses).cpu(), "(d w) -> d w", d=domains).double().mean(-1)
    experts = torch.stack([torch.cat(of_gate) for of_gate in chosen], 1)
    weights = [gate.weight for gate in gates]
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    return {
        "loss": loss * torch.tensor(text.tokens_per_byte).double(),
        "experts": rearrange(experts, "(d w t) l k -> d w t l k", d=domains, t=rows.shape[1]),
        "spectral_norm": torch.stack([spectral_norm(weight) for weight in whole]).cpu(),
        "stable_rank": torch.stack([stable_rank(weight) for weight in whole]).cpu(),
        "cosine": torch.stack([mean_absolute_cosine(weight) for weight in whole]).cpu(),
    }


@contextlib.contextmanager
def _choices(gates: Sequence[Gate]) -> Iterator[list[list[Tensor]]]:
    """What each gate chooses, (tokens, k) a call, as int16 on the CPU."""
    seen: list[list[Tensor]] = [[] for _ in gates]

    def note(index: int, output: Any) -> None:
        tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
        indices = next((part for part in tensors if not part.is_floating_point()), None)
        if indices is None:
            raise ExperimentError(
                f"the gate {gates[index].name} hands out no chosen experts; --model must be one whose gates return "
                "(logits, weights, indices)"
            )
        weights = next((part for part in tensors if part.is_floating_point() and part.shape == indices.shape), None)
        if weights is not None:  # some do not sort
            indices = indices.gather(-1, weights.argsort(dim=-1, descending=True, stable=True))
        seen[index].append(indices.flatten(0, -2).to("cpu", torch.int16))

    hooks = [
        gate.module.register_forward_hook(lambda module, args, output, index=index: note(index, output))
        for index, gate in enumerate(gates)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mean_absolute_cosine(weight: Tensor) -> Tensor:
    """Of the rows of (K, d), over pairs of different ones; 0 at right angles."""
    rows = F.normalize(weight.double(), dim=-1)
    experts = len(rows)
    return ((rows @ rows.mT).abs().sum() - experts) / (experts * (experts - 1))


def load(experts: Tensor, count: int) -> Tensor:
    """(*, L, k) -> (L, K): share of the assignments that each expert gets."""
    flat = rearrange(experts.long().flatten(0, -3), "n l k -> l (n k)")
    counts = torch.stack([torch.bincount(row, minlength=count) for row in flat]).double()
    return counts / counts.sum(-1, keepdim=True)


def fluctuation(before: Tensor, after: Tensor) -> Tensor:
    """(*, L, k) twice -> (L): share of the tokens whose heaviest expert is another one."""
    return (before[..., 0] != after[..., 0]).flatten(0, -2).double().mean(0)


def rerouted(before: Tensor, after: Tensor) -> Tensor:
    """(D, W, T, L, k) twice -> (D, L): share of the tokens of a domain whose set of experts is another one."""
    other = (before.sort(-1).values != after.sort(-1).values).any(-1)
    return rearrange(other, "d w t l -> d l (w t)").double().mean(-1)


def domain_shares(experts: Tensor, count: int) -> Tensor:
    """(D, W, T, L, k) -> (L, D, K): share of the tokens of a domain whose heaviest expert it is."""
    return torch.stack([load(of_domain[..., :1], count) for of_domain in experts], 1)


def specialisation(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(D, W, T, L, k) -> (L) twice: I(domain; heaviest expert) / H(domain), and what chance gives.

    0: the experts know nothing of the domain; 1: they tell it. By chance it is above 0: the mean over shuffles of the
    windows among the domains (of whole windows, as the tokens of one belong together).
    """
    top = experts[..., :1]
    generator = torch.Generator().manual_seed(0)
    mixed = rearrange(top, "d w t l k -> (d w) t l k")
    shuffled = [
        _information(domain_shares(mixed[torch.randperm(len(mixed), generator=generator)].view_as(top), count))
        for _ in range(SHUFFLES)
    ]
    return _information(domain_shares(top, count)), torch.stack(shuffled).mean(0)


def told_by_tokens(validation: Tensor, count: int) -> tuple[float, float]:
    """(D, W, T) -> what a gate that knows the current token alone tells of the domain, by chance and at best.

    By chance: I(domain; expert) / H(domain), mean over random maps from tokens to experts.
    At best: I(domain; token) / H(domain).
    """
    generator = torch.Generator().manual_seed(0)
    size = int(validation.max()) + 1
    maps = torch.randint(count, (MAPS, size), generator=generator)
    mapped = rearrange(maps[:, validation], "l d w t -> d w t l 1")
    tokens = rearrange(validation, "d w t -> d w t 1 1")
    return float(_information(domain_shares(mapped, count)).mean()), float(_information(domain_shares(tokens, size)))


def _information(shares: Tensor) -> Tensor:
    """(L, D, K) -> (L); the domains have equally many tokens. NaN for a single one, which has no entropy."""
    domains = shares.shape[1]
    joint = shares / domains
    both = torch.special.xlogy(joint, joint).sum((1, 2))
    experts = torch.special.xlogy(joint.sum(1), joint.sum(1)).sum(-1)
    entropy = torch.tensor(float(domains)).double().log()
    return (both + entropy - experts).clamp_min(0) / entropy


def row(step: int, now: dict[str, Any], before: dict[str, Any] | None, text: Text, count: int) -> dict[str, Any]:
    """One measurement as plain numbers."""
    shares = load(now["experts"], count)
    told, chance = specialisation(now["experts"], count)
    return {
        "step": step,
        "loss": float(now["loss"].mean()),
        "domains": dict(zip(text.domains, now["loss"].tolist(), strict=True)),
        "load": shares.tolist(),
        "load_cv": [float(load_balance_loss(of_layer[None])) ** 0.5 for of_layer in shares],
        "max_share": shares.amax(-1).tolist(),
        "dead": (shares < DEAD / count).sum(-1).tolist(),
        "spectral_norm": now["spectral_norm"].tolist(),
        "stable_rank": now["stable_rank"].tolist(),
        "cosine": now["cosine"].tolist(),
        "fluctuation": None if before is None else fluctuation(before["experts"], now["experts"]).tolist(),
        "specialisation": told.tolist(),
        "specialisation_chance": chance.tolist(),
    }


class Measurements:
    """The measurements of a phase, each in a file of its own, so that a resumed run has those from before."""

    def __init__(self, config: Config, network: Any, text: Text, folder: Path) -> None:
        self.config, self.network, self.text, self.folder = config, network, text, folder
        self.gates = find_gates(network)
        counts = {gate.num_experts for gate in self.gates}
        if len(counts) != 1:
            raise ExperimentError(
                "--model must be a mixture of experts with as many experts in each layer, got "
                + (f"layers of {sorted(counts)} experts" if counts else f"{type(network).__name__} without gates")
            )
        (self.count,) = counts

    def __call__(self, step: int) -> dict[str, Any]:
        now = evaluate(self.network, self.gates, self.text, self.config)
        if writes():
            save_checkpoint(self.folder / f"{step:08}.pt", now)
        return row(step, now, None, self.text, self.count)

    def history(self) -> list[dict[str, Any]]:
        rows, first, before = [], None, None
        for file in sorted(self.folder.glob("*.pt")):
            now = load_checkpoint(file, torch.device("cpu"))
            first = now if first is None else first
            rows.append(row(int(file.stem), now, before, self.text, self.count))
            moved = rerouted(first["experts"], now["experts"]).mean(-1).tolist()
            rows[-1]["rerouted"] = dict(zip(self.text.domains, moved, strict=True))
            before = now
        rows[-1]["domain_shares"] = domain_shares(now["experts"], self.count).tolist()
        return rows


def writes() -> bool:
    """Whether this process is the one that writes files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
