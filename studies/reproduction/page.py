"""All that saved results say: the named sections that the pages docs/reproduction*.md take in, and the pictures."""

from __future__ import annotations

from pathlib import Path

from examples.shared.storage import write_text

from . import answers, failing, figures, parts, posthoc, printed, routing, stages, sweep, tables, verdict
from . import statistics as stats
from .cells import words
from .protocol import STAGES
from .statistics import Results

NAME = "reproduction_tables.md"
CAPTIONS = {  # of a section of pictures, by how their names begin
    "paths": "How much of the class the path tells, a dot a seed, by phase and router",
    "gradients": "Gradient norm per expert and layer, mean over the one-shot updates",
    "forgetting": "The change of accuracy by an update: where equally much is learned, and at the largest rate",
    "accuracy": "Test accuracy, a dot a seed, by phase and router",
    "sweep": "Differences of accuracy and delta from the spectral router as it is",
    "failure": "Which networks train, and the accuracy of those that do, by condition and router",
}


def write(results: Results, docs: Path) -> list[Path]:
    """Make tables and pictures from saved results; return the files."""
    file = docs / NAME
    write_text(file, text(results))
    return [file, *figures.draw(results, docs / "images")]


def text(results: Results) -> str:
    """The sections, as pymdownx.snippets reads them."""
    sections = (
        {"protocol": protocol(results)}
        | verdict.sections(results)
        | answers.sections(results)
        | printed.sections(results)
        | tables.sections(results)
        | parts.sections(results)
        | routing.sections(results)
        | posthoc.sections(results)
        | failing.sections(results)
        | sweep.sections(results)
        | stages.sections(results)
        | pictures(results)
    )
    return "\n".join(
        f"<!-- --8<-- [start:{name}] -->\n{content.strip()}\n<!-- --8<-- [end:{name}] -->\n"
        for name, content in sections.items()
    )


def protocol(results: Results) -> str:
    """What ran."""
    rows = []
    for stage in STAGES:
        for phase, settings in results["protocol"]["main"]["phases"].items():
            records = stats.select(results, stage, phase)
            if not records:
                continue
            data = results["protocol"]["data"][settings["data"]]
            each = settings.get("samples_per_class", data.get("samples_per_class"))
            failed = len(records) - len(stats.trained(results, records))
            seeds = f"{records[0]['seed']} to {records[-1]['seed']}"
            count = len(stats.arms(records))
            listed = ", ".join(tables.routers_of(results, phase)) if stage == "main" else f"{count} settings"
            rows.append([stage, phase, str(each), seeds, str(len(records)), str(failed), listed])
    if not rows:
        return tables.ABSENT
    hours = sum(record["training_seconds"] for record in results["runs"]) / 3600
    made_with = "; ".join(", ".join(f"{name} {number}" for name, number in of.items()) for of in results["versions"])
    head = ["stage", "phase", "images a class", "seeds", "networks", "failed", "routers"]
    devices = ", ".join(results["devices"])
    told = f"{len(results['runs'])} networks, {hours:.1f} hours of training in sum, on {devices}; {made_with}."
    return words(head, rows) + f"\n{told}\n"


def pictures(results: Results) -> dict[str, str]:
    """Those that these results have, each a link to itself: in the page they are small."""
    names = list(figures.pictures(results))
    sections = {}
    for start, caption in CAPTIONS.items():
        files = [f"images/{name}.png" for name in names if name.startswith(f"reproduction_{start}")]
        sections[f"figure-{start}"] = "\n\n".join(f"[![{caption}]({file})]({file})" for file in files) or tables.ABSENT
    return sections
