"""Which pictures a report has: over the depth of one checkpoint, of the drift between two, over a run of several."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import Comparison
from .inspection import CheckpointReport
from .pictures import Curve, chart, hues
from .words import labels

_PROFILES = (
    ("spectral_norm", "Spectral norm σ max"),
    ("stable_rank", "Stable rank"),
    ("centred_stable_rank", "Centred stable rank"),
    ("effective_rank", "Effective rank"),
    ("energy", "Hyperspherical energy"),
    ("closest", "Closest pair, of the median distance"),
)


def over_depth(report: CheckpointReport) -> list[str]:
    """One picture a number, over the gates in their order."""
    ticks = labels([gate.name for gate in report.gates])
    charts = []
    for name, title in _PROFILES:
        values = [float("nan") if gate.geometry is None else getattr(gate.geometry, name) for gate in report.gates]
        known = all(name in gate.fresh for gate in report.gates)
        band = [(gate.fresh[name][0], gate.fresh[name][2]) for gate in report.gates] if known else None
        charts.append(chart(title, [Curve(title, values)], ticks, band=band))
    lengths = [
        Curve(
            word, [float("nan") if g.geometry is None else float(getattr(g.geometry.row_norms, how)()) for g in report.gates], i
        )
        for i, (word, how) in enumerate((("median", "median"), ("shortest", "min"), ("longest", "max")))
    ]
    charts.append(chart("Row lengths: shortest, median, longest", lengths, ticks, floor=0))
    if any(gate.bias_spread is not None for gate in report.gates):
        spread = [float("nan") if gate.bias_spread is None else gate.bias_spread for gate in report.gates]
        charts.append(chart("Spread of the selection bias", [Curve("spread", spread)], ticks, floor=0))
    return charts


def of_drift(comparison: Comparison) -> list[str]:
    """One picture a measure of change, over the gates."""
    ticks = labels([gate.name for gate in comparison.gates])
    gates = comparison.gates
    charts = [
        chart("Relative change ‖W′ − W‖ / ‖W‖", [Curve("change", [gate.change for gate in gates])], ticks, floor=0),
        chart(
            "Cosine of each row with itself: least orange, median green",
            [
                Curve("median", [float(gate.row_cosines.median()) for gate in gates]),
                Curve("least", [float(gate.row_cosines.min()) for gate in gates], 1),
            ],
            ticks,
        ),
        chart("Certified share of rows", [Curve("share", [gate.certified_share for gate in gates])], ticks, floor=0),
        chart(
            "Largest principal angle, degrees",
            [Curve("angle", [float(g.angles.max().rad2deg()) if len(g.angles) else float("nan") for g in gates])],
            ticks,
            floor=0,
        ),
    ]
    for name, title in _PROFILES[:3]:
        pair = [
            Curve(word, [float("nan") if g.geometry is None else getattr(g.geometry, name) for g in side], hue)
            for hue, (word, side) in enumerate(
                (("after", [gate.after for gate in gates]), ("before", [gate.before for gate in gates]))
            )
        ]
        charts.append(chart(f"{title}: before orange, after green", pair, ticks))
    return charts


def over_run(reports: Sequence[CheckpointReport], drifts: Sequence[Comparison]) -> list[str]:
    """One curve a gate, over the checkpoints."""
    ticks = [str(place + 1) for place in range(len(reports))]
    names = labels([gate.name for gate in reports[0].gates])
    ramp = hues(len(names))
    charts = []
    for name, title in _PROFILES[:4]:
        curves = [
            Curve(label, [_of(report, place, name) for report in reports], hue)
            for place, (label, hue) in enumerate(zip(names, ramp, strict=True))
        ]
        charts.append(chart(title, curves, ticks, across="checkpoint"))
    for attribute, title in (("change", "Change from the first checkpoint"), ("certified_share", "Certified share of rows")):
        curves = [
            Curve(label, [getattr(drift.gates[place], attribute) for drift in drifts], hue)
            for place, (label, hue) in enumerate(zip(names, ramp, strict=True))
        ]
        charts.append(chart(title, curves, ticks, across="checkpoint", floor=0))
    return charts


def _of(report: CheckpointReport, place: int, name: str) -> float:
    found = report.gates[place].geometry
    return float("nan") if found is None else float(getattr(found, name))
