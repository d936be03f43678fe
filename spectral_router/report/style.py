"""How the page looks, and what its words mean."""

from __future__ import annotations

from .verdicts import ALIKE, CLOSE, COLLAPSED, LOUD, NARROW, QUIET

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1c2128;--faint:#667;--line:#dde1e6;--card:#f6f8fa;
--c0:#0b6e6e;--c1:#c2571a;--c2:#6a4fb3;--band:rgba(11,110,110,.13);--light:42%;--good:#1a7f4b;--bad:#b3401f}
@media(prefers-color-scheme:dark){:root{--ground:#14181d;--text:#e3e7ec;--faint:#98a2ae;--line:#2e353d;--card:#1c2229;
--c0:#4fc3bd;--c1:#f0925a;--c2:#b39cf0;--band:rgba(79,195,189,.16);--light:64%;--good:#58c98b;--bad:#f08a6a}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1100px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.3rem;overflow-wrap:anywhere}h2{font-size:1.08rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
.hint,.dim td{color:var(--faint)}.hint{margin:.2rem 0 .6rem;font-size:.9rem}
.good,.bad{border-left:4px solid var(--good);background:var(--card);padding:.6rem .9rem;border-radius:4px}
.bad{border-color:var(--bad)}.bad p{margin:0}.bad ul{margin:.3rem 0 0;padding-left:1.2rem}.bad span{color:var(--faint)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr));gap:10px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px}
figcaption{font-size:.85rem;margin-bottom:2px;overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}
polyline{fill:none;stroke-width:1.7}.grid{stroke:var(--line)}.tick{fill:var(--faint);font-size:11px}.band{fill:var(--band)}
.heat img{width:100%;display:block;image-rendering:pixelated;background:var(--ground)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,th:last-child,td:last-child{text-align:left}
td:last-child{white-space:normal;min-width:11rem}dt{font-weight:600}dd{margin:0 0 .4rem 1rem}
"""

_WORDS = (
    ("σ max", "largest singular value of the gate's matrix W, one row an expert: how much it amplifies"),
    ("stable rank", "‖W‖_F² / σ_max²: directions in use, softly; at most the number behind “of”"),
    ("centred", "stable rank of W without its mean row, which no softmax over the experts sees"),
    ("effective", "effective rank: exp of the entropy of the singular values' shares"),
    ("condition", "largest over smallest singular value"),
    ("energy", "mean over pairs of rows of 1 / r², r their distance on the unit sphere: how much directions crowd"),
    ("closest", "the nearest pair of experts, and the cosine of their rows"),
    (
        "certified",
        "share of rows that moved by less than half their distance to every other row: still nearest to their old place",
    ),
    ("swapped", "i↔j: each row is now nearest to the other's old place; taken: rows that are nearest to another's"),
    ("collapsed", f"centred stable rank below {COLLAPSED}, or the rows' differences hold less than {ALIKE:.0%} of ‖W‖²"),
    ("narrow", f"centred stable rank below 1 + {NARROW:g} of what a fresh gate has above 1"),
    ("duplicates", f"rows nearer to each other than {CLOSE:g} of the median distance"),
    ("dead-looking", f"rows shorter than {QUIET:g} of the median: next to the same score for every token"),
    ("loud", f"rows longer than {LOUD:g} times the median"),
    ("closed", "a selection bias so low that the expert cannot be among the chosen"),
    ("broken, zero", "NaN or inf in the matrix; nothing but zeros"),
)
EXPLAINED = (
    "<h2>What the words mean</h2>"
    '<p class="hint">A verdict is about the matrix alone; what tokens make of it, data must say.</p>'
    "<dl>" + "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS) + "</dl>"
)
