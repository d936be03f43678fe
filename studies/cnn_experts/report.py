"""The tables, as text and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.image_classification.report import markdown
from examples.shared.storage import write_text

Rows = list[tuple[str, list[str]]]
# label, name in the summary, format
QUANTITIES = (
    ("Test accuracy, %", "accuracy", ".2f"),
    ("Importance CV²", "importance_cv2", ".3f"),
    ("Load CV²", "load_cv2", ".3f"),
    ("Experts used (1 % of the images or more)", "experts_used", ".1f"),
    ("I(class; expert) / H(class)", "mutual_information", ".3f"),
    ("the same, by chance", "mutual_information_chance", ".3f"),
    ("Purity (largest class of each expert)", "purity", ".3f"),
    ("One fixed expert: best, %", "fixed_best", ".1f"),
    ("One fixed expert: mean, %", "fixed_mean", ".1f"),
    ("One fixed expert: worst, %", "fixed_worst", ".1f"),
    ("One fixed expert, mean over used experts, %", "fixed_used", ".1f"),
    ("On an expert's own images: best, %", "own_best", ".1f"),
    ("On an expert's own images: worst, %", "own_worst", ".1f"),
    ("Closed in training, % of experts times steps", "closed", ".1f"),
    ("Steps with a closed expert, %", "steps_with_closed", ".1f"),
    ("Largest excess over the bound, in the bound's unit", "largest_excess", ".3f"),
)
WIDTH = 160
LABELS = {name: label for label, name, _ in QUANTITIES}
FORMS = {name: form for _, name, form in QUANTITIES}


def write(results: dict[str, Any], out: Path) -> None:
    """Print the tables and write them to tables.md."""
    arms = list(results["summary"])
    titled = [
        (title(results), arm_rows(results), arms),
        ("The paper's claims", claim_rows(results), ["difference", "claimed", "verdict"]),
    ]
    console = Console()
    if not console.is_terminal:  # a file has no width, and seven arms need more than 80 columns
        console = Console(width=WIDTH)
    for heading, rows, columns in titled:
        table = Table("", *columns, title=escape(heading), title_justify="left")
        for label, cells in rows:
            table.add_row(escape(label), *cells)
        console.print(table)
    console.print(footnote(results), soft_wrap=True, highlight=False)
    text = "\n".join(f"### {heading}\n\n{markdown(rows, columns)}" for heading, rows, columns in titled)
    text += f"\n{footnote(results)}\n"
    write_text(out / "tables.md", text)


def title(results: dict[str, Any]) -> str:
    config = results["config"]
    return (
        f"Stage {config['position']} of ResNet-18 (width {config['width']}) as {config['experts']} experts of "
        f"{results['inner_planes']} inner planes, top {config['top_k']}, gate {config['gate']}, {config['epochs']} epochs, "
        f"seeds {len(results['seeds'])}"
    )


def arm_rows(results: dict[str, Any]) -> Rows:
    summaries, plain = results["summary"].values(), results["plain"]
    rows: Rows = [
        (label, [f"{summary[name]['mean'] / plain[name]:.3f}" for summary in summaries])
        for label, name in (("Parameters / plain", "parameters"), ("Multiply-adds / plain", "multiply_adds"))
    ]
    shown = [quantity for quantity in QUANTITIES if any(quantity[1] in summary for summary in summaries)]
    measured: Rows = [
        (label, [_cell(summary[name], form) if name in summary else "–" for summary in summaries])
        for label, name, form in shown
    ]
    return measured[:1] + rows + measured[1:]


def claim_rows(results: dict[str, Any]) -> Rows:
    rows: Rows = []
    for claim in results["claims"]:
        rows.append((claim["claim"], ["", "", claim["verdict"]]))
        for one in claim["rows"]:
            label = f"… {LABELS[one['quantity']]}: {one['comparison']}"
            rows.append((label, [_cell(one, "+" + FORMS[one["quantity"]]), one["claimed"], one["verdict"]]))
    return rows


def footnote(results: dict[str, Any]) -> str:
    images, seeds, plain = results["data"]["images"], len(results["seeds"]), results["plain"]
    spread = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t)." if seeds > 1 else "One seed: no intervals."
    )
    return (
        f"{spread} One of the {images['test']} test images is {100 / images['test']:.2f} points. The plain network has "
        f"{plain['parameters']:,.0f} parameters and takes {plain['multiply_adds'] / 1e6:.1f} million multiply-adds an image."
    )


def _cell(entry: dict[str, Any], form: str) -> str:
    spread = "" if entry["ci95"] is None else f" ± {entry['ci95']:{form.lstrip('+')}}"
    # adding 0.0 turns a rounded -0.0 into 0.0
    return f"{round(entry['mean'], int(form[-2])) + 0.0:{form}}{spread}"
