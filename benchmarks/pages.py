"""The tables and the picture of the benchmark page, of saved runs.

    for run in 1 2 3; do python -m benchmarks --json figures_$run.json; done
    python -m benchmarks.pages figures_*.json

Tables are those of the first run, targets and picture of all. What the picture shows is kept in benchmarks/growth.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from examples.shared.figures import save
from examples.shared.storage import write_json

from . import targets
from ._harness import Report
from .growth import NAMES, TITLES, WAYS

SAVED = Path(__file__).with_name("growth.json")
DELIVERY = ("Penalty: time of an optimizer step", "The balance loss's full gradient", "Trained with the balance loss")


def tables(run: dict[str, Any]) -> tuple[str, str]:
    """All tables of a run, and apart from them those of the two deliveries."""
    reports = [Report(**report) for report in run["reports"]]
    header = " · ".join(f"{key} {value}" for key, value in run["machine"].items())
    others = [report.markdown() for report in reports if not report.title.startswith(DELIVERY)]
    delivery = [report.markdown().replace("### ", "", 1) for report in reports if report.title.startswith(DELIVERY)]
    bold = [f"**{title}**\n{rest}" for title, _, rest in (text.partition("\n") for text in delivery)]
    return "\n".join([header + "\n", *others]), "\n".join(bold)


def growth_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds by what grows, its size and the way: the median of each run."""
    found: dict[str, Any] = {"machine": runs[0]["machine"]}
    for name, title in TITLES.items():
        sizes: dict[str, dict[str, list[float]]] = {}
        for run in runs:
            for report in run["reports"]:
                for size, seconds in report["raw"].items() if report["title"] == title else ():
                    for way, times in seconds.items():
                        of_way = sizes.setdefault(size, {}).setdefault(way, [])
                        of_way.append(float(f"{1e3 * statistics.median(times):.4g}"))
        found[name] = sizes
        found[f"{name}, note"] = next(r["notes"][0] for r in runs[0]["reports"] if r["title"] == title)
    return found


def growth(saved: dict[str, Any]) -> Figure:
    """Time against size, both logarithmic: the median over the runs, and what lies between the lowest and the highest."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained", sharey=True)
    for axes, name in zip(grid, NAMES, strict=True):
        sizes = sorted(map(int, saved[name]))
        for color, (way, label) in enumerate(WAYS.items()):
            times = [saved[name][str(size)][way] for size in sizes]
            axes.plot(sizes, [statistics.median(t) for t in times], marker="o", color=f"C{color}", label=label)
            axes.fill_between(sizes, [min(t) for t in times], [max(t) for t in times], color=f"C{color}", alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel(f"{NAMES[name]} {name}")
        axes.set_title(saved[f"{name}, note"].rstrip("."), fontsize=10)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("ms, forward + backward")
    grid[0].legend(fontsize=9)
    figure.suptitle(f"Cost of the penalty: {saved['machine']['device']}", fontsize=11)
    return figure


def draw(saved: dict[str, Any], docs: Path) -> list[Path]:
    return save({"benchmark_growth": growth}, saved, docs / "images")


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=(__doc__ or "").splitlines()[0])
    flags.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="written by python -m benchmarks --json; none: picture only"
    )
    flags.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages (default: %(default)s)")
    flags.add_argument(
        "--saved", type=Path, default=SAVED, help="where the picture's figures are kept (default: benchmarks/growth.json)"
    )
    arguments = flags.parse_args(argv)
    if arguments.files:
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.files]
        all_tables, delivery = tables(runs[0])
        pages = {"benchmark_tables": all_tables, "benchmark_targets": targets.table(runs) + "\n", "delivery_table": delivery}
        arguments.docs.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (arguments.docs / f"{name}.md").write_text(text, encoding="utf-8")
        write_json(arguments.saved, growth_of(runs))
    for file in draw(json.loads(arguments.saved.read_text(encoding="utf-8")), arguments.docs):
        print(file)


if __name__ == "__main__":
    main()
