"""Arguments that several functions take: top_k, and rules that name modules.

Such a rule is a name or its suffix, a regular expression, a class, a predicate, or several of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def check_tensor(value: object, name: str) -> None:
    """A clear error for a numpy array, a list, a module."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; make one of it with torch.as_tensor")


def check_top_k(top_k: int, num_experts: int | None = None) -> None:
    """A clear error for what is no number of experts to choose; `num_experts` may not be known yet."""
    whole = isinstance(top_k, int) and not isinstance(top_k, bool)
    if not (whole and top_k >= 1 and (num_experts is None or top_k <= num_experts)):
        known = "" if num_experts is None else f", {num_experts=}"
        raise ValueError(f"top_k must be a whole number between 1 and num_experts, got {top_k=}{known}")


def flat(rules: Any, take: str, last: str, *leaves: type) -> list[Any]:
    """One list of single rules. `take` and `last` begin and end the error's sentence; `leaves` are other kinds of rules."""
    if isinstance(rules, (str, re.Pattern, *leaves)) or callable(rules):
        return [rules]
    if not isinstance(rules, Iterable):
        raise TypeError(f"{take} names, patterns, module classes, predicates or {last}, got {rules!r}")
    return [rule for item in rules for rule in flat(item, take, last, *leaves)]


def meets(rule: Any, name: str, module: nn.Module, take: str) -> bool:
    if isinstance(rule, str):
        return name == rule or name.endswith(f".{rule}") or _fullmatch(rule, name, take)
    if isinstance(rule, re.Pattern):
        return rule.fullmatch(name) is not None
    if isinstance(rule, type):
        return isinstance(module, rule)
    return callable(rule) and bool(rule(name, module))


def _fullmatch(pattern: str, name: str, take: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        raise ValueError(f"{take} a name, a suffix or a valid regular expression, got {pattern!r}") from None
