"""Does `wrap_moe` find every gate of every model here, read it right and leave the model alone? A table of the answers.

python -m studies.gates                     # all models, about two minutes
python -m studies.gates mixtral deepspeed   # some
python -m studies.gates --markdown docs/gates_found.md
python -m studies.gates --example             # found by what one forward computes, beside names
python -m studies.gates --example --renamed   # the same, with nothing left that a name could tell
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_router import Gate, LoadBalanceLoss, SpectralRankPenalty, find_gates, wrap_moe

from . import GROUPS
from .cases import Case
from .renamed import anonymous

# of the order of the task, so that a wrong term shows
PENALTY_COEF, BALANCE_COEF = 0.5, 0.5


@dataclass(frozen=True)
class Finding:
    """What came out for one model. `unchanged` and `error` are None where the model has no gates or cannot run.

    found: expected gates that were found, with the right number of experts and scoring; extra: gates that are none.
    error: largest difference, over the gates, of the gradient of the gate's matrix from the one written out by hand,
        relative to its norm.
    """

    name: str
    group: str
    found: int
    expected: int
    extra: int
    unchanged: bool | None
    error: float | None

    @property
    def good(self) -> bool:
        exact = self.found == self.expected and not self.extra
        return exact and self.unchanged is not False and (self.error is None or self.error <= 1e-5)


def examine(group: str, case: Case, with_example: bool = False) -> Finding:
    """One model, found by names, or by what it computes of one batch, which `wrap_moe` then gets too."""
    model, inputs = case.build()
    with_example = with_example and case.runs
    gates = find_gates(model, example=inputs if with_example else None)
    found, extra = _match(case, model, gates)
    unchanged = error = None
    if case.expected and case.runs and found:
        unchanged = _unchanged(model, inputs, gates if with_example else None)
        try:
            error = _gradient_error(case, with_example)
        except (RuntimeError, TypeError, ValueError) as problem:  # a wrong reading; the others still count
            print(f"\n{case.name}: {problem}", file=sys.stderr)
            error = float("inf")
    return Finding(case.name, group, found, len(case.expected), extra, unchanged, error)


def _match(case: Case, model: nn.Module, gates: Sequence[Gate]) -> tuple[int, int]:
    """How many expected gates are among those found, and how many found ones are not expected."""
    truth = Counter((id(model.get_parameter(e.parameter)), e.num_experts, e.scoring) for e in case.expected)
    # the slices of a stack count as the one parameter that they are
    stacks = [gate for gate in gates if not gate.index]
    seen = Counter((id(gate.matrix), gate.num_experts, gate.scoring) for gate in stacks)
    return (truth & seen).total(), (seen - truth).total()


def _unchanged(model: nn.Module, inputs: dict[str, Any], gates: list[Gate] | None) -> bool:
    """Outputs bit for bit in evaluation, keys of the state and class, while wrapped and afterwards."""
    model.eval()
    before, keys, kind = _run(model, inputs), list(model.state_dict()), type(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = wrap_moe(model, gates=gates)
    during = _run(model, inputs)
    same = list(model.state_dict()) == keys and type(model) is kind
    handle.remove()
    after = _run(model, inputs)
    return same and all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, during, after, strict=True))


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    return _tensors(model(**inputs))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else []
    return [tensor for value in values for tensor in _tensors(value)]


def _gradient_error(case: Case, with_example: bool) -> float:
    model, inputs = case.build()
    by_hand = _train_by_hand(case, model.train(), inputs)
    model, inputs = case.build()
    with warnings.catch_warnings():  # a gate of the other modality does not run
        warnings.simplefilter("ignore")
        example = inputs if with_example else None
        handle = wrap_moe(model.train(), penalty_coef=PENALTY_COEF, balance_coef=BALANCE_COEF, example=example)
        torch.manual_seed(1)
        output = model(**inputs)
    if isinstance(output, Mapping) and output.get("loss") is not None:
        loss = output["loss"]
    else:
        loss = _task(output) + handle.loss()
    loss.backward()
    errors = []
    for parameter, truth in by_hand.items():
        gradient = model.get_parameter(parameter).grad
        errors.append(float("inf") if gradient is None else ((gradient - truth).norm() / truth.norm()).item())
    return max(errors)


def _train_by_hand(case: Case, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the gates' matrices under task + penalty + balance losses, no hook of the library involved."""
    torch.manual_seed(1)
    with case.truth(model) as probs:
        output = model(**inputs)
    matrices: dict[int, list[Tensor]] = {}
    for gate in case.expected:
        matrix = model.get_parameter(gate.parameter)
        if matrix.ndim == 1:
            matrices[id(matrix)] = [matrix.view(gate.num_experts, -1)]
        elif matrix.ndim == 3:
            matrices[id(matrix)] = list(matrix)
        else:  # rows beyond the experts' are for something else
            matrices[id(matrix)] = [matrix if gate.num_experts in matrix.shape else matrix[: gate.num_experts]]
    penalty, balance = SpectralRankPenalty("initial", relative=True), LoadBalanceLoss()
    loss = output["loss"] if isinstance(output, Mapping) and output.get("loss") is not None else _task(output)
    loss = loss + PENALTY_COEF * penalty([matrix for group in matrices.values() for matrix in group])
    for gate in case.expected:
        if gate.module in probs:
            stack = model.get_parameter(gate.parameter)
            parts = probs[gate.module].chunk(len(stack)) if stack.ndim == 3 else [probs[gate.module]]
            loss = loss + BALANCE_COEF * sum(balance(part) for part in parts)
    loss.backward()
    return {gate.parameter: model.get_parameter(gate.parameter).grad for gate in case.expected}  # type: ignore[misc]


def _task(output: Any) -> Tensor:
    return next(t for t in _tensors(output) if t.is_floating_point() and t.requires_grad).float().square().mean()


def table(findings: Sequence[Finding]) -> str:
    """Markdown, one row a model."""
    lines = ["| model | kind | gates found / expected | false positives | output unchanged | gradient error |"]
    lines.append("|---|---|---|---|---|---|")
    for f in findings:
        unchanged = "-" if f.unchanged is None else "yes" if f.unchanged else "NO"
        error = "-" if f.error is None else "0" if f.error == 0 else f"{f.error:.0e}"
        lines.append(f"| {f.name} | {f.group} | {f.found} / {f.expected} | {f.extra} | {unchanged} | {error} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.gates", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of models; default: all")
    parser.add_argument("--example", action="store_true", help="find gates by what one forward computes, beside names")
    parser.add_argument("--renamed", action="store_true", help="call all parts at random first, so that names tell nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args(argv)
    cases = [(group, case) for group, members in GROUPS.items() for case in members]
    unknown = set(arguments.models) - {case.name for _, case in cases}
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(case.name for _, case in cases)}")
    findings = []
    for group, case in cases:
        if not arguments.models or case.name in arguments.models:
            findings.append(examine(group, anonymous(case) if arguments.renamed else case, arguments.example))
            if sys.stderr.isatty():
                print(
                    f"\r{len(findings)} models, {sum(not f.good for f in findings)} with a fault",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
    text = table(findings)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    return int(not all(f.good for f in findings))


if __name__ == "__main__":
    sys.exit(main())
