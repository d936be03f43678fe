"""The report as one page: pictures, tables and what the words mean; nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .charts import of_drift, over_depth, over_run
from .comparison import Comparison
from .gate_report import GateReport
from .inspection import CheckpointReport
from .pictures import heat_map
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

_DEPTH = ("Over depth", "Shaded: 5 % to 95 % of fresh gates of the same shape.")
_DRIFT = ("Drift over depth", "Row spaces, rows and norms, before and after.")
_RUN = ("Over the run", "One curve a gate: from blue, the first, by purple to orange, the last; each dot tells its gate.")
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
    state = [_section(*_DEPTH, over_depth(last)), _inspected(last), _heat_maps(last)]
    if not drifts:
        title, parts = heading(last), state
    elif over_time:
        title = f"{len(reports)} checkpoints: {reports[0].path} to {last.path}"
        parts = [_table("Over the checkpoints", OVER_TIME, over_time_rows(reports, drifts))]
        parts += [_section(*_RUN, over_run(reports, drifts)), f"<h2>The last one: {escape(heading(last))}</h2>", *state]
    else:
        title = f"{reports[0].path} → {last.path}"
        parts = [_section(*_DRIFT, of_drift(drifts[0])), _table("Each router", COMPARED, compared_rows(drifts[0]))]
        parts.append(_heat_maps(last))
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


def _section(title: str, hint: str, charts: Sequence[str]) -> str:
    return f'<h2>{title}</h2><p class="hint">{hint}</p><div class="charts">{"".join(charts)}</div>'


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


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], dim: int = 0) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=dim' if place < dim else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for place, row in enumerate(rows)
    )
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
