"""What the small language models say of the penalty and of the balance loss, in training and in fine-tuning."""

from __future__ import annotations

from matplotlib.figure import Figure

from studies.verdicts import RULE

from .lines import line, section
from .panels import panels
from .tables import Cell, Table, Tables

RANK, DEAD, LOAD, LOSS = (
    "Stable rank of the gates, mean",
    "Dead experts, all layers",
    "Load CV, mean of layers",
    "Validation loss, nats/byte",
)
EQUAL, DOMAINS, CHANGES = (
    "the same, at equal gain",
    "I(domain; top-1) / H(domain), mean",
    "Top-1 changes between measurements, late",
)


def training(tables: Tables) -> str:
    """Of the whole training, against no term."""
    seeds, gaps = tables.seeds(), tables.named("Differences to none")

    def said(text: str, name: str, arms: tuple[str, ...], sign: int, unit: str = "") -> str:
        row = gaps.row(name)
        verdict = line(text, [row[arm] for arm in arms], sign, seeds, "arms")
        return f"{verdict}. Minus none: {'; '.join(f'{arm} {row[arm]}' for arm in arms)}{unit}."

    lines = [
        said(
            "the penalty raises the stable rank of the gates",
            RANK,
            ("penalty", "both"),
            1,
            f"; none has {_level(tables, RANK)}",
        ),
        said("the balance loss evens out the load", LOAD, ("balance", "both"), -1, f"; none has CV {_level(tables, LOAD)}"),
        said("fewer experts die", DEAD, tuple(gaps.columns), -1, f"; none has {_level(tables, DEAD)}"),
        said("the validation loss is lower", LOSS, tuple(gaps.columns), -1, " nats/byte"),
        said("less is forgotten in the adaptation to one domain", EQUAL, tuple(gaps.columns), -1, " nats/byte at equal gain"),
        said("experts specialise more in domains", DOMAINS, tuple(gaps.columns), 1),
        said("the routing becomes more stable", CHANGES, tuple(gaps.columns), -1),
    ]
    return section(lines) + f"\n{RULE} {seeds} seeds; differences are paired by seed.\n"


def finetuning(tables: Tables) -> str:
    """Of gates that are trained already, against no term."""
    seeds, gaps = tables.seeds(), tables.named("Differences to none")
    levels = tables.tables[0]
    rerouted, lost = gaps.row("Old domains: tokens rerouted"), gaps.row(EQUAL, "Old domains: loss given up")
    gain, rank = gaps.row("New domain: gain, nats/byte"), gaps.row("Stable rank of the gates, after")
    before, after = levels.row("Stable rank of the gates, before"), levels.row("Stable rank of the gates, after")

    def told(row: dict[str, Cell]) -> str:
        return "; ".join(f"{arm} {one}" for arm, one in row.items())

    arms = tuple(gaps.columns)
    balanced = tuple(arm for arm in arms if "balance" in arm or arm == "both")
    ranks = line("spread raises the stable rank of trained gates", [rank["spread"]], 1, seeds)
    moved = line("a term reroutes tokens of the old domains", [rerouted[arm] for arm in arms], 1, seeds, "arms")
    worse = line("with the balance loss the old domains lose more", [lost[arm] for arm in balanced], 1, seeds, "arms")
    gains = line("an arm gains more on the new domain", [gain[arm] for arm in arms], 1, seeds, "arms")
    lines = [
        f"{ranks}: {rank['spread']}, from {before['none']}. Hold has next to nothing to do here: without a term it goes to "
        f"{after['none']}.",
        f"{moved}. As a share, minus that of fine-tuning without a term: {told(rerouted)}.",
        f"{worse}. At equal gain, nats/byte, minus none: {told(lost)}.",
        f"{gains}. Nats/byte, minus none: {told(gain)}.",
    ]
    return section(lines)


def picture(tables: Tables) -> Figure:
    """What each term changes: the gates, the load, the loss."""
    table = tables.tables[0]
    titles = {
        "stable rank of the gates (directions used)": RANK,
        "dead experts, all layers (fewer is better)": DEAD,
        "load CV (0: even)": LOAD,
        "validation loss, nats/byte (lower is better)": LOSS,
    }
    return panels(
        {title: table.row(name) for title, name in titles.items()},
        table.columns,
        note=f"diamond: mean over {tables.seeds()} seeds; bar: its 95 % interval",
    )


def picture_finetuning(tables: Tables) -> Figure:
    """What each preset changes of trained gates, against no term."""
    table: Table = tables.named("Differences to none")
    cells = {
        "stable rank of the gates": table.row("Stable rank of the gates, after"),
        "old domains: share of tokens rerouted (less: steadier)": table.row("Old domains: tokens rerouted"),
        "old domains: loss given up, nats/byte (less is better)": table.row(EQUAL, "Old domains: loss given up"),
        "new domain: gain, nats/byte (more is better)": table.row("New domain: gain, nats/byte"),
    }
    note = f"difference from no term, paired by seed; diamond: mean over {tables.seeds()} seeds; bar: its 95 % interval"
    return panels(cells, table.columns, marks=dict.fromkeys(cells, 0.0), note=note)


def _level(tables: Tables, name: str) -> str:
    return str(tables.tables[0].row(name)["none"])
