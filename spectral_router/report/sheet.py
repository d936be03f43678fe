"""The pictures of a report alone, as one SVG file: for a README, a page of documentation, a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .charts import of_drift, over_depth, over_run
from .comparison import Comparison
from .inspection import CheckpointReport
from .pictures import hues, ramp
from .words import labels

_WIDTH, _HEIGHT, _TITLE, _GAP, _KEY = 460, 210, 22, 14, 26
_NAMED = 8  # gates whose colour the key tells, at most
# the page's colours; without its variables, as programs that draw SVG do not all know them
_STYLE = """
text{font:11px system-ui,sans-serif}.name{font-size:13px;font-weight:600}polyline{fill:none;stroke-width:1.7}
.ground{fill:#fff}.name{fill:#1c2128}.grid{stroke:#dde1e6}.tick{fill:#667}.band{fill:#0b6e6e;fill-opacity:.13}
@media(prefers-color-scheme:dark){.ground{fill:#14181d}.name{fill:#e3e7ec}.grid{stroke:#2e353d}.tick{fill:#98a2ae}}
"""
_COLOURS = {"var(--c0)": "#0b8a84", "var(--c1)": "#d9692a", "var(--c2)": "#8267cf", "var(--light)": "50%"}


def sheet(reports: Sequence[CheckpointReport], drifts: Sequence[Comparison], *, over_time: bool, columns: int = 3) -> str:
    """The charts of a page side by side."""
    if not drifts:
        charts = over_depth(reports[-1])
    else:
        charts = over_run(reports, drifts) if over_time else of_drift(drifts[0])
    charts = [chart for chart in charts if chart]
    columns = max(1, min(columns, len(charts)))
    rows = -(-len(charts) // columns)
    width, height = columns * (_WIDTH + _GAP) + _GAP, rows * (_HEIGHT + _TITLE + _GAP) + _GAP
    key = _key([gate.name for gate in reports[0].gates], height) if over_time and drifts else ""
    height += _KEY if key else 0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{_STYLE}</style><rect class="ground" width="{width}" height="{height}"/>',
    ]
    for place, chart in enumerate(charts):
        left = _GAP + place % columns * (_WIDTH + _GAP)
        top = _GAP + place // columns * (_HEIGHT + _TITLE + _GAP)
        found = re.search(r"<figcaption>(.*?)</figcaption><svg[^>]*>(.*)</svg>", chart, re.DOTALL)
        assert found is not None
        parts.append(f'<text class="name" x="{left + 6}" y="{top + 12}">{found[1]}</text>')
        parts.append(f'<svg x="{left}" y="{top + _TITLE}" width="{_WIDTH}" height="{_HEIGHT}">{_coloured(found[2])}</svg>')
    parts += [key] if key else []
    return "\n".join([*parts, "</svg>"]) + "\n"


def _key(gates: Sequence[str], top: int) -> str:
    """Which curve is which gate: a dot and a name for each, of many for some of them, from the first to the last."""
    names, colours, last = labels(gates), [_coloured(ramp(hue)) for hue in hues(len(gates))], len(gates) - 1
    shown = range(len(gates)) if last < _NAMED else [round(place * last / (_NAMED - 1)) for place in range(_NAMED)]
    parts, left = [], _GAP + 12
    for place in shown:
        parts.append(f'<circle cx="{left}" cy="{top + 4}" r="5" fill="{colours[place]}"/>')
        parts.append(f'<text class="tick" x="{left + 10}" y="{top + 8}">gate {escape(names[place])}</text>')
        left += 60 + 7 * len(names[place])
    return f'<g class="key">{"".join(parts)}</g>'


def _coloured(text: str) -> str:
    """With colours in place of the page's variables."""
    for name, colour in _COLOURS.items():
        text = text.replace(name, colour)
    return text
