"""The pictures of a report alone, as one SVG file: for a README, a page of documentation, a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .charts import of_drift, over_depth, over_run
from .comparison import Comparison
from .inspection import CheckpointReport

_WIDTH, _HEIGHT, _TITLE, _GAP = 460, 210, 22, 14
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
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{_STYLE}</style><rect class="ground" width="{width}" height="{height}"/>',
    ]
    for place, chart in enumerate(charts):
        left = _GAP + place % columns * (_WIDTH + _GAP)
        top = _GAP + place // columns * (_HEIGHT + _TITLE + _GAP)
        found = re.search(r"<figcaption>(.*?)</figcaption><svg[^>]*>(.*)</svg>", chart, re.DOTALL)
        assert found is not None
        inside = found[2]
        for name, colour in _COLOURS.items():
            inside = inside.replace(name, colour)
        parts.append(f'<text class="name" x="{left + 6}" y="{top + 12}">{found[1]}</text>')
        parts.append(f'<svg x="{left}" y="{top + _TITLE}" width="{_WIDTH}" height="{_HEIGHT}">{inside}</svg>')
    return "\n".join([*parts, "</svg>"]) + "\n"
