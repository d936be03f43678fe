"""The term in the loss against the term at the optimizer's step: cost of an optimizer step, and what the step form leaves out.

    python -m benchmarks.delivery

Cost: the penalty alone, over the gates of real models, at one micro-batch a step and at four. What is left out: the part of
a balance loss's gradient that goes into what lies before the gates, and what training makes of that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spectral_router import Gate, LoadBalanceLoss, MoEHandle, SpectralRankPenalty, wrap_moe

from ._harness import Report, device, interleave, parser, progress, publish, show_ms, show_ratio
from .penalty import MODELS, at_the_step, gates, limit
from .wrap import build

SEEDS = (0, 1, 2)
ACCUMULATED = 4  # micro-batches


def in_the_loss(weights: Sequence[nn.Parameter], penalty: SpectralRankPenalty, accumulation: int) -> None:
    for _ in range(accumulation):
        (penalty(weights) / accumulation).backward()


def step(weights: Sequence[nn.Parameter], term: Callable[[], object]) -> None:
    """The task's gradients are there before the term's come, as in training."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    term()


def cost(repeats: int, quick: bool) -> Report:
    report = Report(
        "Penalty: time of an optimizer step, in the loss and at the step",
        ["gates", "in the loss, ms", "4 micro-batches, ms", "at the step, ms", "in the loss / at the step", "4 micro-batches",
         "at the step / limit"],
    )  # fmt: skip
    for name, (layers, experts, dim, count) in MODELS.items():
        progress(name)
        if quick:
            experts, dim, count = min(experts, 16), 64, 3
        weights = gates(count, experts, dim)
        penalty = SpectralRankPenalty(relative=True)
        stacked = torch.stack([weight.detach() for weight in weights])
        contenders: dict[str, Callable[[], object]] = {
            "none": partial(step, weights, lambda: None),
            "loss": partial(step, weights, partial(in_the_loss, weights, penalty, 1)),
            "several": partial(step, weights, partial(in_the_loss, weights, penalty, ACCUMULATED)),
            "step": partial(step, weights, at_the_step(weights)),
            "limit": partial(limit, stacked, torch.empty_like(stacked)),
        }
        seconds = interleave(contenders, repeats)
        # without the task's own gradients, which every contender has to have
        own = {
            key: [t - base for t, base in zip(seconds[key], seconds["none"], strict=True)]
            for key in ("loss", "several", "step")
        }
        label = f"{name}, {count}{'' if count == layers else f' of {layers}'} x ({experts}, {dim})"
        report.raw[label] = seconds
        every = {**own, "limit": seconds["limit"]}
        ratios = [show_ratio(every, *pair, 1) for pair in (("loss", "step"), ("several", "step"), ("step", "limit"))]
        report.rows.append([label, *(show_ms(own[key]) for key in ("loss", "several", "step")), *ratios])
    return report


def batches(seed: int, count: int, size: tuple[int, int]) -> list[Tensor]:
    """A language with something to learn: each token follows from the last one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    follow = torch.randperm(64, generator=generator)
    made = []
    for _ in range(count):
        ids = torch.randint(64, size, generator=generator)
        for place in range(1, size[1]):
            keeps = torch.rand(size[0], generator=generator) < 0.8
            ids[:, place] = torch.where(keeps, follow[ids[:, place - 1]], ids[:, place])
        made.append(ids.to(device()))
    return made


def slopes(model: nn.Module, term: Tensor) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(term, list(learning.values()), allow_unused=True)
    return {name: grad for name, grad in zip(learning, found, strict=True) if grad is not None}


def left_out(quick: bool) -> list[Report]:
    part = Report(
        "The balance loss's full gradient against that of the gates alone, in a Mixtral of 4 layers",
        ["after", "share of the full gradient's norm before the gates", "cosine of both, at the gates"],
    )
    outcome = Report(
        "Trained with the balance loss in the loss, at the step, and without: the last tenth of the steps",
        ["delivery", "CV², mean over the gates", "task loss"],
    )
    steps = 2 if quick else 150
    for seed in SEEDS[:1] if quick else SEEDS:
        for arm in ("in the loss", "at the step", "none"):
            progress(f"seed {seed}, {arm}")
            for name, value in train(seed, arm, steps).items():
                (part if " after " in name else outcome).raw.setdefault(name, {}).setdefault("seeds", []).append(value)
    for when in (0, steps):
        cells = [spread(part.raw[f"{kind} after {when}"]["seeds"]) for kind in ("share", "cosine")]
        part.rows.append([f"{when} steps", *cells])
    for arm in ("in the loss", "at the step", "none"):
        outcome.rows.append([arm, *(spread(outcome.raw[f"{kind} {arm}"]["seeds"]) for kind in ("CV²", "task"))])
    for report in (part, outcome):
        report.notes.append(f"Mean and, in brackets, lowest and highest of {len(SEEDS)} seeds.")
    return [part, outcome]


def train(seed: int, arm: str, steps: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = build(4, 64, 64, 8).to(device())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle = wrap_moe(
        model,
        optimizer if arm == "at the step" else None,
        penalty=None,
        balance=None if arm == "none" else LoadBalanceLoss(),
        balance_coef=0.1,
    )
    found: dict[str, float] = {}
    ends = []
    for number, ids in enumerate(batches(seed, steps, (8, 32)), 1):
        if arm == "in the loss" and number in (1, steps):
            share, cosine = compare(model, handle, ids)
            when = 0 if number == 1 else steps
            found |= {f"share after {when}": share, f"cosine after {when}": cosine}
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number > steps - max(steps // 10, 1):
            ends.append(task_and_balance(model, handle, ids))
    tasks, balances = zip(*ends, strict=True)
    return {**found, f"task {arm}": statistics.fmean(tasks), f"CV² {arm}": statistics.fmean(balances)}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def balances(model: nn.Module, handle: MoEHandle, ids: Tensor, alone: bool) -> Tensor:
    """The sum of the balance losses of one forward; `alone`: of what comes into each gate, held constant."""
    seen: list[Tensor] = []

    def note(gate: Gate, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].detach() if alone else args[0]
        seen.append(gate.score(gate.logits(tokens.flatten(0, -2))))

    hooks = [gate.module.register_forward_hook(lambda _m, args, _o, gate=gate: note(gate, args)) for gate in handle.gates]
    model.eval()  # the handle records nothing
    model(input_ids=ids)
    model.train()
    for hook in hooks:
        hook.remove()
    loss = LoadBalanceLoss()
    return torch.stack([loss(probs) for probs in seen]).sum()


def compare(model: nn.Module, handle: MoEHandle, ids: Tensor) -> tuple[float, float]:
    full, own = (slopes(model, balances(model, handle, ids, alone)) for alone in (False, True))
    gate_names = list(own)
    everywhere = torch.cat([grad.flatten() for grad in full.values()])
    before = torch.cat([grad.flatten() for name, grad in full.items() if name not in gate_names])
    one, other = (torch.cat([found[name].flatten() for name in gate_names]) for found in (full, own))
    return (before.norm() / everywhere.norm()).item(), torch.cosine_similarity(one, other, dim=0).item()


@torch.no_grad()
def task_and_balance(model: nn.Module, handle: MoEHandle, ids: Tensor) -> tuple[float, float]:
    balance = balances(model, handle, ids, True) / len(handle.gates)
    model.eval()
    task = model(input_ids=ids, labels=ids).loss
    model.train()
    return task.item(), balance.item()


def measure(repeats: int, quick: bool) -> list[Report]:
    return [cost(repeats, quick), *left_out(quick)]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("delivery", __doc__, repeats=15).parse_args(argv)
    publish(measure(2 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
