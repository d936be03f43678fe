"""Gates by the names and shapes of tensors alone, beside experts that stand in the same block."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

from ..gates.find import GATE_NAME
from .quantised import is_packed, numbers_of
from .stored import Checkpoint, natural

_NOT_OF_THE_MODEL = re.compile(r"(^|\.)(optim\w*|exp_avg\w*|ema|scheduler)\.")
# beside what a gate is called in models: the name of llama.cpp
_IN_GGUF = re.compile(r"ffn_gate_inp")
_MATRIX = re.compile(r"weight|kernel|gate_weight|w_gate|w_gating|w_g|prototypes|sim_matrix")
_NOT_SCORING = re.compile(r"norm|noise|scale|bias|lora")
_NUMBERED = re.compile(r"(?:^|\.)\w*experts?(?:\.\w+)??\.(\d+)\.|experts?\.[\w.]*?weight(\d+)$")
_SHARED = re.compile(r"shared|shexp")
SELECTION = re.compile(r"correction_bias|expert_biase?s?$|balancing_bias|exp_probs_b|selection_bias|moe_statics|score_bias")


@dataclass(frozen=True)
class ByName:
    """A tensor that scores experts: its name, their number, and whether it is `(dim, experts)`."""

    name: str
    key: str
    num_experts: int
    transposed: bool
    note: str | None = None


def gates_by_name(checkpoint: Checkpoint) -> tuple[list[ByName], list[str]]:
    """The gates in the order of their layers, and near misses: names like a gate's whose shapes fit no number of experts."""
    counts = _experts_beside(checkpoint)
    stated = checkpoint.says("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    gates: dict[str, ByName] = {}
    misses = []
    for key in sorted(checkpoint.tensors, key=natural):
        shape = checkpoint.tensors[key].shape
        name, block = _gate_name(key)
        if not name or len(shape) not in (1, 2) or _SHARED.search(key):
            continue
        if is_packed(checkpoint, key):
            numbers_of(checkpoint, key)  # its shape says nothing; the sentence is there
        near = counts.get(block) or counts.get(block.rpartition(".")[0]) or set()
        if type(stated) is int and stated > 1 and not near & set(shape) and (near or _has_experts(checkpoint, block)):
            near = near | {stated}
        found = _flat(name, key, shape[0], near) if len(shape) == 1 else _fit(name, key, shape, near)
        if found is None and len(shape) == 2 and not near and _has_experts(checkpoint, block) and 1 < shape[0] < shape[1]:
            found = ByName(name, key, shape[0], False, f"{shape[0]} experts by the shape of the gate alone")
        if found is not None and name in gates:  # a router of several layers: the last one scores
            found = replace(found, note=f"the last of several matrices in {name}")
        if found is not None:
            gates[name] = found
        elif len(shape) == 2:
            misses.append(f"{key} {tuple(shape)}")
    return list(gates.values()), misses


def _gate_name(key: str) -> tuple[str, str]:
    """The path up to the part that is called as gates are, which is the last one, or is followed by at most four more; and the
    block around it. Both empty if there is none."""
    parts = key.split(".")
    if not _NOT_OF_THE_MODEL.search(key):
        for place in range(len(parts) - 1, max(-1, len(parts) - 5), -1):
            rest = parts[place + 1 :]
            called = GATE_NAME.fullmatch(parts[place].lower()) or _IN_GGUF.fullmatch(parts[place])
            if called and (not rest or _MATRIX.fullmatch(rest[-1])) and not _NOT_SCORING.search(".".join(rest)):
                # the outermost word of several, as in router.gate.weight
                while place and GATE_NAME.fullmatch(parts[place - 1].lower()):
                    place -= 1
                outside = place
                while outside > 1 and parts[outside - 1].isdigit() and GATE_NAME.fullmatch(parts[outside - 2].lower()):
                    outside -= 2  # several gates in a list
                if parts[place].lower() in ("gates", "routers") and rest and rest[0].isdigit():
                    place += 1
                return ".".join(parts[: place + 1]), ".".join(parts[:outside])
    return "", ""


def _flat(name: str, key: str, size: int, near: set[int]) -> ByName | None:
    """One vector of all rows, as OLMo-core has it."""
    counts = [count for count in near if size % count == 0 and size > 4 * count]
    if len(counts) != 1 or not key.endswith("weight"):
        return None
    return ByName(name, key, counts[0], False, f"a flat tensor, {counts[0]} rows of {size // counts[0]}")


def _fit(name: str, key: str, shape: tuple[int, ...], near: set[int]) -> ByName | None:
    rows, columns = shape
    fits = [side for side, size in enumerate(shape) if size in near]
    if fits == [0, 1]:
        return ByName(name, key, rows, False, f"{rows} x {columns}: rows taken for the experts")
    if fits:
        return ByName(name, key, shape[fits[0]], fits == [1])
    # rows for a shared expert, or for experts that do nothing
    slack = [count for count in near if count < rows <= count + 4]
    if slack:
        return ByName(name, key, rows, False, f"{rows} rows beside {max(slack)} experts")
    return None


def _experts_beside(checkpoint: Checkpoint) -> dict[str, set[int]]:
    """By block, the numbers of experts that stand in it: stacked, or numbered from 0 on."""
    numbered: defaultdict[str, set[int]] = defaultdict(set)
    counts: defaultdict[str, set[int]] = defaultdict(set)
    stacks: defaultdict[str, list[int]] = defaultdict(list)
    for key, stored in checkpoint.tensors.items():
        if len(stored.shape) == 3 and 1 not in stored.shape and not re.search(r"conv|att|shared", key):
            stacks[re.sub(r"\.\w+(\.weight)?$", "", key)].append(stored.shape[0])
        if "exp" not in key.lower() or _SHARED.search(key) or _NOT_OF_THE_MODEL.search(key):
            continue
        lower = key.lower()
        if found := _NUMBERED.search(lower):
            numbered[_block(key, found.start())].add(int(found[1] or found[2]))
        elif len(stored.shape) == 3 and stored.shape[0] > 1:
            place = re.search(r"(?:^|\.)\w*(?:experts?|_exps)(?=\.|\b|_)", lower)
            if place:
                counts[_block(key, place.start())].add(stored.shape[0])
    for block, numbers in numbered.items():
        if len(numbers) > 1 and numbers == set(range(len(numbers))):
            counts[block].add(len(numbers))
    for block, sizes in stacks.items():  # two stacks of as many matrices, whatever they are called
        counts[block] |= {size for size in sizes if sizes.count(size) > 1}
    return counts


def _block(key: str, start: int) -> str:
    return key[:start].rstrip(".")


def _has_experts(checkpoint: Checkpoint, block: str) -> bool:
    prefix = f"{block}." if block else ""
    return any(key.startswith(prefix) and "expert" in key.lower()[len(prefix) :] for key in checkpoint.tensors)


def selection_bias_beside(checkpoint: Checkpoint, key: str, num_experts: int) -> str | None:
    """The tensor that is added to the scores for the choice alone, in the gate's own module or in its block."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, max(0, len(parts) - 4), -1):
        prefix = ".".join(parts[:depth]) + "."
        if re.fullmatch(r".*(layers?|blocks?|blk|h)\.\d+\.", prefix) and len(parts) - depth > 2 and not _IN_GGUF.search(key):
            break
        found = [
            name
            for name, stored in checkpoint.tensors.items()
            if name.startswith(prefix)
            and SELECTION.search(name[len(prefix) :])
            and num_experts in (stored.shape[-1] if stored.shape else 0, *stored.shape)
        ]
        if found:
            return min(found, key=len)
    return None
