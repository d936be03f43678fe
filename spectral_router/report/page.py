"""The report as one page: pictures, tables and what the words mean; nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .comparison import Comparison
from .gate_report import GateReport
from .inspection import CheckpointReport
from .pictures import Curve, chart, heat_map
from .style import EXPLAINED, STYLE
from .words import (
    COMPARED,
    INSPECTED,
    OVER_TIME,
    WITH_DATA,
    candidates,
    compared_rows,
    data_rows,
    fresh_rows,
    heading,
    inspected_row,
    labels,
    over_time_rows,
)

_PROFILES = (
    ("spectral_norm", "Spectral norm σ max"),
    ("stable_rank", "Stable rank"),
    ("centred_stable_rank", "Centred stable rank"),
    ("effective_rank", "Effective rank"),
    ("energy", "Hyperspherical energy"),
    ("closest", "Closest pair, of the median distance"),
)
_HEAT_MAPS = 128  # at most so many, of so many experts
_EXPERTS = 512


def page(
    reports: Sequence[CheckpointReport],
    drifts: Sequence[Comparison],
    *,
    over_time: bool,
    data: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """HTML of one checkpoint, of a comparison of two, or of a run over time; `data`: what a batch made of the last."""
    last = reports[-1]
    if not drifts:
        title, parts = heading(last), [*_depth(last), _inspected(last), _heat_maps(last)]
    elif over_time:
        title = f"{len(reports)} checkpoints: {reports[0].path} to {last.path}"
        parts = [_table("Over the checkpoints", OVER_TIME, over_time_rows(reports, drifts)), *_curves(reports, drifts)]
        parts += [f"<h2>The last one: {escape(heading(last))}</h2>", *_depth(last), _inspected(last), _heat_maps(last)]
    else:
        title = f"{reports[0].path} → {last.path}"
        parts = [*_drift(drifts[0]), _table("Each router", COMPARED, compared_rows(drifts[0])), _heat_maps(last)]
    if data:
        parts.append(
            _table("With data: medians over tokens, and the share whose choice rounding changes", WITH_DATA, data_rows(data))
        )
    told = candidates(last.gates, drifts[0] if drifts and not over_time else None)
    if told:
        parts.append(_table("Candidates for merging or pruning, to be tried on data", ("gate", "what", "why"), told))
    notes = [note for report in reports for note in report.notes]
    if notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes)) + "</ul>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{_verdicts(last)}\n{body}\n{EXPLAINED}</main></body></html>\n"
    )


def _verdicts(report: CheckpointReport) -> str:
    ill = [(label, gate) for label, gate in _labelled(report) if gate.verdict != "healthy"]
    count = len(report.gates)
    if not ill:
        return f'<p class="good">All {count} gates are healthy: none breaks a rule.</p>'
    rows = "".join(
        f"<li><b>{escape(label)}</b>: {escape(str(verdict))} <span>({escape(verdict.rule)})</span></li>"
        for label, gate in ill
        for verdict in gate.verdicts
    )
    return f'<div class="bad"><p>{len(ill)} of {count} gates are not healthy:</p><ul>{rows}</ul></div>'


def _labelled(report: CheckpointReport) -> list[tuple[str, GateReport]]:
    return list(zip(labels([gate.name for gate in report.gates]), report.gates, strict=True))


def _depth(report: CheckpointReport) -> list[str]:
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
    shaded = '<p class="hint">Shaded: 5 % to 95 % of fresh gates of the same shape.</p>'
    return ["<h2>Over depth</h2>", shaded, f'<div class="charts">{"".join(charts)}</div>']


def _inspected(report: CheckpointReport) -> str:
    rows = fresh_rows(report) + [inspected_row(gate, label) for label, gate in _labelled(report)]
    return _table("Each gate", INSPECTED, rows, dim=len(fresh_rows(report)))


def _heat_maps(report: CheckpointReport) -> str:
    maps = [
        heat_map(gate.geometry.cosines, label)
        for label, gate in _labelled(report)[:_HEAT_MAPS]
        if gate.geometry is not None and gate.num_experts <= _EXPERTS
    ]
    if not maps:
        return ""
    hint = "Cosine of each expert's row with each other's. Red: alike; blue: opposite; clear: at right angles."
    more = f" The first {len(maps)} of {len(report.gates)} gates." if len(maps) < len(report.gates) else ""
    return f'<h2>Row cosines</h2><p class="hint">{hint}{more}</p><div class="maps">{"".join(maps)}</div>'


def _drift(comparison: Comparison) -> list[str]:
    ticks = labels([gate.name for gate in comparison.gates])
    gates = comparison.gates
    charts = [
        chart("Relative change ‖W′ − W‖ / ‖W‖", [Curve("change", [gate.change for gate in gates])], ticks, floor=0),
        chart(
            "Cosine of each row with itself: least, median",
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
        charts.append(chart(f"{title}: before (second colour), after", pair, ticks))
    return ["<h2>Drift over depth</h2>", f'<div class="charts">{"".join(charts)}</div>']


def _curves(reports: Sequence[CheckpointReport], drifts: Sequence[Comparison]) -> list[str]:
    """One curve a gate, over the checkpoints."""
    ticks = [str(place + 1) for place in range(len(reports))]
    names = labels([gate.name for gate in reports[0].gates])
    ramp = [place / max(1, len(names) - 1) for place in range(len(names))]
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
    hint = '<p class="hint">One curve a gate: blue the first, red the last; each dot tells its gate.</p>'
    return ["<h2>Over the run</h2>", hint, f'<div class="charts">{"".join(charts)}</div>']


def _of(report: CheckpointReport, place: int, name: str) -> float:
    found = report.gates[place].geometry
    return float("nan") if found is None else float(getattr(found, name))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], dim: int = 0) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=dim' if place < dim else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for place, row in enumerate(rows)
    )
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
