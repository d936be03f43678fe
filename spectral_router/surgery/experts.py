"""Which parameters, or slices of stacked ones, belong to which expert of a gate: told by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..gates.adapters import on_parameter
from ..gates.evidence import shaped
from ..gates.gate import Gate
from .layout import flat_layout
from .part import Index, Part

_SHARED = re.compile(r"shared|common", re.I)
# experts that are scored with the others and do nothing have no parameters
_SLACK = 4


def experts_of(gate: Gate, block: nn.Module | None = None) -> list[list[Part]]:
    """The parameters, or slices of parameters, of each expert that a gate scores, by structure.

    An expert is an entry of a `ModuleList` or `ModuleDict`; an entry of parameters stacked over experts, their biases
    included; a parameter with the expert's number at the end of its name; a stretch of the rows or columns of flat matrices
    that hold all experts side by side, which is then seen from the gradients of a few random tokens; a row of the
    embeddings behind product keys. PEFT's adapters belong to the expert that they adapt. What all
    experts share, shared experts among it, belongs to none.

    **Shape**
        - One list for each expert, in the gate's order, of length K (of the keys' pairs for product keys); empty for an
          expert without parameters, as the zero experts of LongCat.

    Args:
        gate: as `find_gates` finds it.
        block: the module that holds the experts, where the gate was written by hand or found beside no experts.

    Raises:
        ValueError: there are no experts beside the gate, or they cannot be told apart.

    >>> import torch
    >>> from spectral_router import find_gates
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router = nn.Linear(16, 4)
    ...         self.experts = nn.Module()
    ...         self.experts.up = nn.Parameter(torch.randn(4, 16, 32))
    ...         self.experts.up_bias = nn.Parameter(torch.randn(4, 32))
    >>> experts_of(find_gates(Block())[0])[2]
    [Part(4x16x32[2:3]), Part(4x32[2:3])]
    """
    block = gate.block if block is None else block
    if block is None:
        raise ValueError(
            f"the gate {gate.name!r} does not say where its experts are; take it from find_gates, or call experts_of(gate, "
            "block=...) with the module that holds them"
        )
    with shaped(block):
        found = _ProductKeys(gate, block).parts if gate.scoring == "product_keys" else _Search(gate, block).parts
    if not any(found):
        raise ValueError(
            f"no experts found beside the gate {gate.name!r} in {type(block).__name__}: neither a list of {gate.num_experts} "
            f"modules nor parameters stacked over {gate.num_experts} experts; call experts_of(gate, block=...) with the module "
            "that holds them"
        )
    owner: dict[int, int] = {}
    for number, parts in enumerate(found):
        for part in parts:
            if part.index is None and owner.setdefault(id(part.parameter), number) != number:
                raise ValueError(
                    f"experts {owner[id(part.parameter)]} and {number} of the gate {gate.name!r} share a parameter, so they "
                    "cannot be told apart; give each a copy of its own"
                )
    return found


def shared_experts_of(gate: Gate) -> list[Part]:
    """The parameters of what every token passes beside the experts: modules called shared, without their gates."""
    found = []
    for name, module in [] if gate.block is None else gate.block.named_children():
        if _is_shared(name, module) and not re.search(r"gate$", name):
            found += [Part(parameter) for parameter in module.parameters()]
    return found


def _is_shared(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__  # of a whole family the classes may be called so
    return bool(_SHARED.search(name) or ("expert" not in name.lower() and re.search(r"shared_?expert", kind, re.I)))


def expert_modules(gate: Gate, block: nn.Module) -> list[nn.Module]:
    """The children of a block that hold its experts by their name or class; else the block's children but the router."""
    others = [
        (name, child)
        for name, child in block.named_children()
        if not _is_shared(name, child) and not any(module is gate.module for module in child.modules())
    ]
    named = [child for name, child in others if "expert" in f"{name} {type(child).__name__}".lower()]
    return named or [child for _, child in others]


class _Search:
    """The experts of one gate."""

    def __init__(self, gate: Gate, block: nn.Module) -> None:
        self.gate, self.count = gate, gate.num_experts
        self.lists: list[list[nn.Module]] = []
        self.stacks: list[tuple[nn.Parameter, int]] = []  # and the number of experts in it
        self.maybe: list[nn.Parameter] = []  # stacked over experts if there are other stacks: biases
        self.numbered: list[dict[int, nn.Parameter]] = []
        self.cut: list[tuple[nn.Parameter, list[Index]]] = []  # slices that are known
        self.flat: list[nn.Parameter] = []
        for module in expert_modules(gate, block):
            self._walk(module)
        if not (self.lists or self.stacks or self.numbered or self.cut):
            self._own(block)
        self.parts: list[list[Part]] = [[] for _ in range(self.count)]
        self._assign(block)

    def _walk(self, module: nn.Module) -> None:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            children = [child for child in module.children() if any(True for _ in child.parameters())]
            # an expert that PEFT adapts is of the class of the others all the same
            if self._fits(len(children)) and len({type(getattr(child, "base_layer", child)) for child in children}) == 1:
                self.lists.append(children)
                return
        if on_parameter(module):
            self._adapter(module)
            self._walk(module.get_submodule("base_layer"))
            return
        self._own(module)
        for child in module.children():
            self._walk(child)

    def _fits(self, size: int) -> bool:
        return max(2, self.count - _SLACK) <= size <= self.count

    def _own(self, module: nn.Module) -> None:
        """The parameters of a module itself."""
        numbered: dict[str, dict[int, nn.Parameter]] = {}
        for name, parameter in module.named_parameters(recurse=False):
            shape = parameter.shape
            if found := re.fullmatch(r"(.*\D)(\d+)", name):
                numbered.setdefault(found[1], {})[int(found[2])] = parameter
            if self.gate.index is not None and len(shape) > 2:
                if shape[1] == self.count:  # a gate inside of an outer expert
                    outer = slice(self.gate.index, self.gate.index + 1)
                    self.cut.append((parameter, [(outer, slice(i, i + 1)) for i in range(self.count)]))
            elif len(shape) > 2 and self._fits(shape[0]):
                self.stacks.append((parameter, shape[0]))
            elif len(shape) == 2:
                (self.maybe if self._fits(shape[0]) else self.flat).append(parameter)
            elif len(shape) == 1 and self._fits(shape[0]):
                self.maybe.append(parameter)
        for of_name in numbered.values():
            if self._fits(len(of_name)) and set(of_name) == set(range(len(of_name))):
                self.numbered.append(of_name)
                self.flat = [p for p in self.flat if all(p is not other for other in of_name.values())]

    def _adapter(self, layer: Any) -> None:
        """PEFT's LoRA on a stacked parameter: A is (experts x rank, in), B is (out, rank x experts)."""
        experts = layer.num_experts
        if not self._fits(experts):
            return
        for module in layer.lora_A.values():
            rank = module.weight.shape[0] // experts
            self.cut.append((module.weight, [(slice(i * rank, (i + 1) * rank),) for i in range(experts)]))
        for module in layer.lora_B.values():
            self.cut.append((module.weight, [(slice(None), slice(i, None, experts)) for i in range(experts)]))

    def _assign(self, block: nn.Module) -> None:
        sizes = [len(children) for children in self.lists] + [size for _, size in self.stacks] + [len(n) for n in self.numbered]
        if sizes:
            # what is stacked over more has rows for experts that do nothing
            real = min(sizes)
            widths = {size for parameter, _ in self.stacks for size in parameter.shape[1:]}
            for children in self.lists:
                for number, child in enumerate(children):
                    self.parts[number] += [Part(parameter) for parameter in child.parameters()]
            for of_name in self.numbered:
                for number, parameter in of_name.items():
                    self.parts[number].append(Part(parameter))
            stacked = [parameter for parameter, _ in self.stacks]
            # of a vector nothing tells experts from features where their numbers agree
            stacked += [p for p in self.maybe if self.stacks and (p.ndim == 2 or len(p) not in widths)]
            for parameter in stacked:
                for number in range(real):
                    self.parts[number].append(Part(parameter, (slice(number, number + 1),)))
        elif not self.cut and self.flat:
            for parameter, dim, step in flat_layout(self.gate, block, self.flat):
                for number in range(self.count):
                    index = (*(slice(None),) * dim, slice(number * step, (number + 1) * step))
                    self.parts[number].append(Part(parameter, index))
        for parameter, indices in self.cut:
            for number, index in enumerate(indices):
                self.parts[number].append(Part(parameter, index))


class _ProductKeys:
    """An expert is a pair of keys, and a row in each of the embeddings beside the gate."""

    def __init__(self, gate: Gate, block: nn.Module) -> None:
        pairs = (gate.num_experts // 2) ** 2
        tables = [parameter for parameter in self._tables(block) if len(parameter) == pairs]
        self.parts = [[Part(table, (slice(i, i + 1),)) for table in tables] for i in range(pairs if tables else 0)]

    @staticmethod
    def _tables(block: nn.Module) -> Iterator[nn.Parameter]:
        for module in block.modules():
            if isinstance(module, nn.Embedding):
                yield module.get_parameter("weight")
