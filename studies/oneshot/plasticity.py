"""What an update costs, read where it teaches equally much: routers whose updates learn nothing also harm nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def interference(curve: Sequence[dict[str, Any]], plasticity: float) -> float | None:
    """Mean delta, in points, at the smallest update that lowers the mean loss of the novel images by the share `plasticity`.

    `curve` has a point for each rate, ascending: loss_before, loss_after, delta, means over the novel images. Linear between
    the rates, and from (0, 0), no update. None if no rate reaches it. A loss of None, what files have for NaN, is passed over.
    """
    learned, delta = 0.0, 0.0
    for point in curve:
        if not point["loss_before"] or point["loss_after"] is None:
            continue
        here = 1 - point["loss_after"] / point["loss_before"]
        if here >= plasticity:
            return float(delta + (point["delta"] - delta) * (plasticity - learned) / (here - learned))
        learned, delta = max(learned, here), point["delta"] if here > learned else delta
    return None
