"""What the comparison of all penalties and balance losses says."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure

from studies.comparison.arms import ARMS, REFERENCE
from studies.verdicts import RULE

from .lines import line, section
from .panels import panels
from .tables import Cell, Tables

TITLES = ("Every arm: accuracy, delta, routing, time of a step", "How each strength was chosen")
DIFFERENCE = "accuracy − reference, points"
TRAINS = 60.0  # accuracy, %: arms below it have failed, and have no scale with the others
NO_BALANCE = ("linear gate", "prototypes")
HEADS = {
    "linear gate": "gates, nothing added",
    "CV² (eq. 6)": "one balance loss, prototypes or as named",
    "no penalty": "prototypes, CV², one penalty",
}
EVEN = ("CV² (eq. 6)", "KL", "Switch", "loss-free bias")


def verdict(tables: Tables) -> str:
    table, seeds = tables.tables[0], tables.seeds()
    accuracy, difference = table.column("accuracy, %"), table.column(DIFFERENCE)
    kept = {arm: found for arm, found in difference.items() if accuracy[arm].mean >= TRAINS}
    failed = [f"{arm} {accuracy[arm]} %" for arm in accuracy if accuracy[arm].mean < TRAINS]
    delta, rank, load = (table.column(name) for name in ("delta at equal plasticity, points", "stable rank", "importance CV²"))
    whole = {arm: found for arm, found in delta.items() if arm in kept and found.half is not None}
    best = max(kept, key=lambda arm: kept[arm].mean)
    plain = [rank[arm] for arm in rank if arm in kept and ARMS[arm].router != "spectral" and "z-loss" not in arm]
    penalties = [rank[arm] for arm in rank if ARMS[arm].settings.get("penalty") not in (None, "rank", "project", "rescue")]
    better = line(f"an arm that trains is more accurate than {REFERENCE}", list(kept.values()), 1, seeds, "arms")
    costs = line("an update changes the accuracy, where all learn equally much", list(whole.values()), 1, seeds, "arms")
    lines = [
        f"{better}. The largest difference, {best}: {kept[best]} points, {seeds} seeds.",
        f"{costs}: the means are {_span(whole.values())} points.",
        f"**What fails here**: {'; '.join(failed)}, in test accuracy.",
        f"**What a penalty acts on, the stable rank** (of 4): projection {rank['projection']}, {REFERENCE} {rank[REFERENCE]}; "
        f"other penalties {_span(penalties)}; without one {_span(plain)}.",
        f"**What a balance loss acts on, the importance CV²**: {_span(load[arm] for arm in NO_BALANCE)} without one, "
        f"{_span(load[arm] for arm in EVEN)} under {', '.join(EVEN)}.",
    ]
    return f"{section(lines)}\n{RULE}\n"


def picture(tables: Tables) -> Figure:
    """Accuracy, delta and stable rank of all arms; those that fail are written at the edge, and set no scale."""
    table = tables.tables[0]
    accuracy, delta = table.column("accuracy, %"), table.column("delta at equal plasticity, points")
    kept = [found for found in accuracy.values() if found.mean >= TRAINS]
    low = min((found.mean - (found.half or 0) for found in kept), default=0.5)
    titles = ("test accuracy, % (more is better)", "change of test accuracy by an update, points", "stable rank (of 4)")
    return panels(
        {
            titles[0]: accuracy,
            titles[1]: {arm: one for arm, one in delta.items() if accuracy[arm].mean >= TRAINS},
            titles[2]: table.column("stable rank"),
        },
        [label for label, _ in table.rows],
        marks={titles[1]: 0.0} | ({titles[0]: accuracy[REFERENCE].mean} if REFERENCE in accuracy else {}),
        limits={titles[0]: (low - 0.5, 100.0)},
        height=0.27,
        heads={arm: head for arm, head in HEADS.items() if arm in accuracy},
        names={"the same, relative": f"{REFERENCE}, relative"},
        note=f"diamond: mean over {tables.seeds()} seeds; bar: its 95 % interval; grey line: {REFERENCE}, or no change; "
        "◀: fails, beyond the scale (chance: 25 %, four digits). CV², no penalty and rescue are the same runs",
    )


def _span(found: Iterable[Cell]) -> str:
    cells = sorted(found, key=lambda one: one.mean)
    return f"{cells[0].mean:{cells[0].form}} to {cells[-1].mean:{cells[-1].form}}"
