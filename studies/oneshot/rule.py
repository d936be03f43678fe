"""How a one-shot update is made."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """As --scope, --oneshot-optimizer and --oneshot-lr."""

    scope: str
    optimizer: str
    lr: float
