"""A line of a verdict from the numbers of tables."""

from __future__ import annotations

from collections.abc import Sequence

from studies.verdicts import Test, label, unbroken, word

from .tables import Cell


def line(claim: str, found: Sequence[Cell], sign: int, seeds: int, of: str = "comparisons") -> str:
    """The verdict on differences that a claim says are above 0 (sign 1) or below it (-1), and the claim."""
    tests = [Test(p, 1 if sign * one.mean > 0 else -1) for one in found if (p := one.p(seeds)) is not None]
    return f"**{label(word(tests, of))}: {claim}**"


def section(lines: Sequence[str]) -> str:
    """As a list."""
    return unbroken("\n".join(f"- {one}" for one in lines) + "\n")
