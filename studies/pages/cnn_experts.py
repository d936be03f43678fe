"""What the study of convolutional experts says of its paper's claims."""

from __future__ import annotations

from matplotlib.figure import Figure

from studies.verdicts import RULE

from .lines import line, section
from .panels import panels
from .tables import Cell, Tables

SOFT, HARD = ("importance", "kl"), ("relative", "mean")
KINDS = {"soft": SOFT, "hard": HARD}
CALLED = {"plain": "plain network", "none": "no constraint", "quiet": "the same, without noise"}
SIGN = {"above 0": 1, "below 0": -1}


def verdict(tables: Tables) -> str:
    seeds = tables.seeds()
    claims: dict[str, list[tuple[str, str, Cell]]] = {}
    table = tables.named("The paper's claims")
    differences = table.column("difference")
    for name, cells in table.rows:
        if not name.startswith("… "):
            claims[name] = []
        elif name in differences:
            claims[list(claims)[-1]].append((name.removeprefix("… "), cells["claimed"], differences[name]))
    made = []
    for claim, rows in claims.items():
        # those that should fall are turned round, so that all of a claim should rise
        turned = [one._replace(mean=SIGN[claimed] * one.mean) for _, claimed, one in rows]
        by_quantity: dict[str, list[str]] = {}
        for name, _, one in rows:
            quantity, _, pair = name.rpartition(": ")
            by_quantity.setdefault(quantity.partition(" (")[0], []).append(f"{pair.replace(' - ', ' − ')} {one}")
        told = "; ".join(f"{quantity}: {', '.join(found)}" for quantity, found in by_quantity.items())
        made.append(f"{line(claim[0].lower() + claim[1:], turned, 1, seeds)}. {told}.")
    levels = next(one for one in tables.tables if "accuracy" in one.rows[0][0])
    load, every, accuracy = (levels.row(name) for name in ("Importance CV²", "One fixed expert: mean, %", "Test accuracy, %"))
    made += [
        "**But over all experts, used or not, the mean constraint is the least general**: one fixed expert is right on "
        + "; ".join(f"{arm} {one}" for arm, one in every.items() if arm in HARD + SOFT)
        + " % of all images.",
        f"**Without a constraint one expert takes nearly all the weight** (importance CV² {load['none']}), and the accuracy "
        f"does not suffer: {accuracy['none']} %, the plain network's is {accuracy['plain']} %.",
    ]
    return section(made) + f"\n{RULE} {seeds} seeds; differences are paired by seed.\n"


def picture(tables: Tables) -> Figure:
    """Evenness, specialisation and accuracy of each constraint."""
    levels = next(one for one in tables.tables if "accuracy" in one.rows[0][0])
    titles = {
        "uneven load: importance CV² (0: even)": "Importance CV²",
        "specialised: how much the expert tells of the class (0 nothing, 1 all)": "I(class; expert) / H(class)",
        "test accuracy, % (more is better)": "Test accuracy, %",
    }
    return panels(
        {title: levels.row(name) for title, name in titles.items()},
        levels.columns,
        absent="no experts",
        names=CALLED | {arm: f"{arm} constraint ({kind})" for kind, arms in KINDS.items() for arm in arms},
        note=f"diamond: mean over {tables.seeds()} seeds; bar: its 95 % interval. Soft: a loss; "
        "hard: experts over their share are closed",
    )
