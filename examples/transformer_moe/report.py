"""The tables, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.image_classification.report import markdown
from examples.shared.storage import write_text

Rows = list[tuple[str, list[str]]]
# label, name in the summary, format
ROUTING = (
    ("Load CV, mean of layers", "load_cv", ".3f"),
    ("Largest share of an expert, any layer", "max_share", ".3f"),
    ("Dead experts, all layers", "dead", ".1f"),
    ("Stable rank of the gates, mean", "stable_rank", ".2f"),
    ("Stable rank, smallest layer", "stable_rank_min", ".2f"),
    ("Spectral norm of the gates, mean", "spectral_norm", ".3f"),
    ("Mean absolute cosine of gate rows", "cosine", ".3f"),
    ("Top-1 changes between measurements, late", "fluctuation", ".3f"),
    ("I(domain; top-1) / H(domain), mean", "specialisation", ".3f"),
    ("the same, by chance", "specialisation_chance", ".3f"),
)
ADAPTATION = (
    ("Adapted domain: gain, nats/byte", "gain", ".4f"),
    ("Other domains: loss given up", "forgetting", "+.4f"),
    ("the same, at equal gain", "forgetting_at_common_gain", "+.4f"),
)
SPEED = (("Tokens a second", "tokens_per_second", ".0f"), ("Tokens a second / none", "speed", ".3f"))
LAYERS = (
    ("load CV", "load_cv", ".3f"),
    ("largest share", "max_share", ".3f"),
    ("stable rank", "stable_rank", ".2f"),
    ("spectral norm", "spectral_norm", ".3f"),
    ("top-1 changes, late", "fluctuation", ".3f"),
    ("I(domain; top-1) / H", "specialisation", ".3f"),
)


def write(results: dict[str, Any], out: Path) -> None:
    """Print the tables and write them to tables.md."""
    arms = list(results["summary"])
    titled = [(title(results), arm_rows(results), arms), ("By layer", layer_rows(results), arms)]
    for reference, of_reference in results["differences"].items():
        if of_reference:
            heading = f"Differences to {reference}, paired by seed"
            titled.append((heading, difference_rows(results, of_reference), list(of_reference)))
    publish(titled, footnote(results), out, "###")


def publish(titled: Sequence[tuple[str, Rows, list[str]]], note: str, out: Path, level: str) -> None:
    """Print tables with a note below, and write them to tables.md under headings of this level."""
    console = Console()
    for heading, rows, columns in titled:
        table = Table("", *columns, title=escape(heading), title_justify="left")
        for label, cells in rows:
            table.add_row(escape(label), *cells)
        console.print(table)
    console.print(note, soft_wrap=True, highlight=False, markup=False)
    text = "\n".join(f"{level} {heading}\n\n{markdown(rows, columns)}" for heading, rows, columns in titled)
    text += f"\n{note}\n"
    write_text(out / "tables.md", text)


def title(results: dict[str, Any]) -> str:
    config = results["config"]
    first = next(iter(results["runs"].values()))[0]["train"]
    network = config["model"] or f"{config['architecture']}, {config['experts']} experts a layer, top {config['top_k']}"
    return (
        f"{network}, {len(first['gates'])} gates, {first['parameters']:,} parameters, {config['steps']} steps "
        f"of {config['batch_size']} x {config['sequence']} tokens, seeds {len(results['seeds'])}"
    )


def losses(results: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    domains = results["data"]["domains"]
    overall = ("Validation loss, nats/byte", "loss", ".4f")
    return (overall, *((f"… {name}", f"loss/{name}", ".4f") for name in domains)) if len(domains) > 1 else (overall,)


def shown(results: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    quantities = losses(results) + ROUTING
    if len(results["data"]["domains"]) == 1:  # nothing to tell apart
        quantities = tuple(one for one in quantities if not one[1].startswith("specialisation"))
    return quantities + (ADAPTATION if results["adapt_domain"] else ())


def arm_rows(results: dict[str, Any]) -> Rows:
    speed = SPEED if "none" in results["summary"] else SPEED[:1]
    rows = [
        (name, (label, [cell(of_arm[name], form) for of_arm in results["summary"].values()]))
        for label, name, form in shown(results) + speed
    ]
    by_token = [f"{results['data']['specialisation_by_token']:.3f}"] * len(results["summary"])
    found: Rows = []
    for name, row in rows:
        found.append(row)
        if name == "specialisation_chance":  # of the text, and the same for every arm
            found.append((f"the same, by the {unit(results)} alone", by_token))
    return found


def unit(results: dict[str, Any]) -> str:
    return "token" if results["config"]["model"] else "byte"


def layer_rows(results: dict[str, Any]) -> Rows:
    gates = len(next(iter(results["runs"].values()))[0]["train"]["gates"])
    several = len(results["data"]["domains"]) > 1
    return [
        (f"{label}, layer {layer}", [cell(of_arm[f"{name}/{layer}"], form) for of_arm in results["summary"].values()])
        for label, name, form in LAYERS
        if several or name != "specialisation"
        for layer in range(1, gates + 1)
    ]


def difference_rows(results: dict[str, Any], of_reference: dict[str, Any]) -> Rows:
    return [
        (label, [cell(of_arm[name], "+" + form.lstrip("+")) for of_arm in of_reference.values()])
        for label, name, form in shown(results)
        if name != "specialisation_chance"
    ]


def footnote(results: dict[str, Any]) -> str:
    seeds, text, config = len(results["seeds"]), results["data"], results["config"]
    spread = (
        f"Mean ± half-width of the 95 % interval over {seeds} seeds (Student's t)." if seeds > 1 else "One seed: no intervals."
    )
    entropies = ", ".join(f"{name} {entropy:.3f}" for name, entropy in text["entropy"].items())
    words = [
        spread,
        f"Measured on {text['validation_tokens']} tokens of validation. Unigram entropy, which a model without context cannot "
        f"beat: {text['pooled_entropy']:.3f} nats/byte ({entropies}).",
        f"Load: share of the assignments of tokens to experts. Dead: below 1 % of an even share. Coefficients: penalty "
        f"{config['alpha']}, balance {config['beta']}, own {config['own_coef']}.",
    ]
    copies = ", ".join(f"{name} {share:.3f}" for name, share in text["copied"].items())
    words.append(
        f"Share of the strings of {text['copied_length']} {unit(results)}s of validation that are in the training text "
        f"too: {copies}."
    )
    if len(text["domains"]) > 1:
        words.append(f"I(domain; {unit(results)}) / H(domain): {text['specialisation_of_tokens']:.3f}.")
    if results["adapt_domain"]:
        words.append(
            f"Adaptation: {config['adapt_steps']} more steps on {results['adapt_domain']} alone; equal gain: that of the arm "
            "that gains least with the same seed."
        )
    return " ".join(words)


def cell(entry: dict[str, Any], form: str) -> str:
    if entry["mean"] is None or entry["mean"] != entry["mean"]:
        return "–"
    spread = "" if entry["ci95"] is None else f" ± {entry['ci95']:{form.lstrip('+')}}"
    # adding 0.0 turns a rounded -0.0 into 0.0
    return f"{round(entry['mean'], int(form[-2])) + 0.0:{form}}{spread}"
