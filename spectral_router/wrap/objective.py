"""What is added to a model's loss: a penalty of the gates' weights and a balance loss of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._precision import full_precision
from ..balance.formulas import expert_sums
from ..gates.gate import Gate
from ..gates.select import refuse_without_logits
from .delivery import token_mask
from .step import Call, Tap
from .weights import full_weight, tied, trainable


class Objective:
    """The term of equation 7 for the gates of one model, and what was measured when it was last computed."""

    taps: list[Tap]
    part: int | None = None  # of a model in several parts: the one whose forward runs; None: all are meant

    def __init__(
        self,
        gates: list[Gate],
        penalty: Callable[[Sequence[Tensor]], Tensor] | None,
        balance: Callable[[Tensor, Tensor | None], Tensor] | None,
        penalty_coef: float,
        balance_coef: float,
    ) -> None:
        self.gates = gates
        self.penalty = penalty
        self.balance = balance
        self.penalty_coef = penalty_coef
        self.balance_coef = balance_coef
        # of the last training forward, by gate: mean probability of each expert, and the balance loss without coefficient.
        # Every gate has its place from the start: code is compiled anew where there is another one
        self.shares: list[Tensor | None] = [None] * len(gates)
        self.balances: list[Tensor | None] = [None] * len(gates)
        self.ties = tied(gates)  # numbers of the gates that share a matrix, for each matrix

    @property
    def balance(self) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        return self._balance

    @balance.setter
    def balance(self, balance: Callable[[Tensor, Tensor | None], Tensor] | None) -> None:
        if (reads := getattr(balance, "reads", "probs")) not in ("probs", "logits"):
            raise ValueError(f'the attribute reads of a balance loss must be "probs" or "logits", got {reads=}')
        if reads == "logits":
            refuse_without_logits(self.gates)
        self._balance = balance

    @property
    def reads_logits(self) -> bool:
        """Whether the balance loss, as it is now, is called with logits."""
        return getattr(self._balance, "reads", "probs") == "logits"

    @property
    def device(self) -> torch.device:
        return self.gates[0].matrix.device if self.gates else torch.device("cpu")

    def total(self, calls: list[tuple[int, Call]], arguments: Mapping[str, Any]) -> Tensor | None:
        """The term of one forward; None if nothing is in it."""
        device = calls[0][1].weight.device if calls else self.device
        parts: list[Tensor] = []
        with full_precision(device):
            # of several calls the first one with a graph
            seen = {i: call.weight for i, call in (*reversed(calls), *(entry for entry in reversed(calls) if entry[1].live))}
            penalty = self.penalty_of(seen)
            if penalty is not None:
                parts.append(self.penalty_coef * penalty)
            parts += [self.balance_coef * balance for balance in self.measured(calls, arguments)]
            return torch.stack([part.to(device) for part in parts]).sum() if parts else None

    def measured(self, calls: list[tuple[int, Call]], arguments: Mapping[str, Any]) -> list[Tensor]:
        """The balance loss of each call; their values and the experts' shares are kept for the metrics."""
        found: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for number, call in calls:
            if call.scores is None:
                continue
            tap = self.taps[number]
            mask = token_mask(arguments, tap.decoding, call.scores, call.layout, call.mask)
            scores = call.scores.detach()
            share = _share(tap.gate.score(scores) if self.reads_logits else scores, mask)
            if self.balance is not None:
                balance = self.balance(call.scores, mask)
                sums[number] = kept(sums.get(number, 0) + balance.detach())
                found.append(balance)
            self.shares[number] = kept(share)
        for number in range(len(self.gates)):
            if self.runs(number):
                self.balances[number] = sums.get(number)
        return found

    def learning(self) -> list[bool]:
        """For each matrix, tied ones being one, whether it learns, in the part that runs."""
        return [self.runs(group[0]) and trainable(self.gates[group[0]]) for group in self.ties]

    def runs(self, number: int) -> bool:
        tap = self.taps[number]
        return not tap.gone and (self.part is None or tap.part == self.part)

    def penalty_of(self, seen: dict[int, Tensor]) -> Tensor | None:
        """The penalty of all gates that learn, of the weights seen in a forward and of the others as they are."""
        learning = self.learning()
        if self.penalty is None or not any(learning):
            return None
        each = getattr(self.penalty, "each", None)
        weights = []
        for group, learns in zip(self.ties, learning, strict=True):
            run = [seen[index] for index in group if index in seen]
            if learns or each is not None:
                # a gate that did not run, as the one of the other modality, has a weight all the same
                weights.append(run[0] if run else full_weight(self.gates[group[0]]))
        if all(learning) or each is None:
            return self.penalty(weights)
        # a penalty that remembers its matrices by position gets them all; the frozen ones' parts are left out
        return torch.stack([part for part, learns in zip(each(weights), learning, strict=True) if learns]).sum()


def kept(tensor: Tensor) -> Tensor:
    """A measurement as it can be kept: one made inside of a `torch.func` transform is a wrapper that dies with it."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _share(probs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean probability of each expert, (K); a token that no expert gets, as of a ReLU router, counts too."""
    total = expert_sums(probs, mask)
    if mask is None:
        return total / max(probs.numel() // probs.shape[-1], 1)
    return total / mask.sum().clamp_min(1)
