"""What `surgical` promises, written out without it: which bits of a model and of its optimizer may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from spectral_router import ExpertPath, experts_of, find_gates

State = dict[str, Tensor]


def may_change(model: nn.Module, path: ExpertPath, also: Iterable[str] = ()) -> State:
    """A mask for each parameter: True where it belongs to an expert on the path."""
    masks = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    gates = {gate.name: gate for gate in find_gates(model)}
    for layer in path.layers:
        experts = experts_of(gates[layer.gate]) if layer.experts else []
        for number in layer.experts:
            for part in experts[number]:
                masks[names[part.parameter]][part.index or ()] = True
    for name in also:
        masks[name][:] = True
    return masks


def bits(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """Copies of all parameters, buffers and states of the optimizer, `name` or `name/state`."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found |= {f"buffer:{name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"{name}/{key}"] = value.clone()
    return found


def assert_only_path_changed(before: State, after: State, masks: State) -> None:
    """Bit for bit off the path; and something did change on it."""
    moved = 0
    for name, value in before.items():
        mask = masks.get(name.partition("/")[0], torch.zeros((), dtype=torch.bool)).expand(value.shape)
        differs = value != after[name]
        assert not (differs & ~mask).any(), f"{name} changed off the path"
        moved += int(differs.sum()) if "/" not in name else 0
    for name, value in after.items():
        if name not in before:  # state that is new: nothing off the path
            mask = masks[name.partition("/")[0]].expand(value.shape)
            assert not value[~mask].any(), f"{name} began off the path"
    assert moved > 0


def steps(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}
