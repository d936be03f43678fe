"""docs/learning_rates.md, its picture and the page of its tables. Every sentence with a number is made here."""

from __future__ import annotations

from pathlib import Path

from examples.shared import figures as pictures
from examples.shared.command import ExperimentError
from examples.shared.runs import interval
from examples.shared.storage import write_text
from studies.reproduction.cells import chance, table, words
from studies.saved import Results
from studies.verdicts import SHOWN

from . import claims, clipping, figures
from .claims import Test
from .results import BASE, OUTCOMES, Arms, Outcome

PAGE, TABLES = "learning_rates.md", "learning_rates_tables.md"
COMMAND = "python -m studies.learning_rates"


def write(results: Results, docs: Path) -> list[Path]:
    if not figures.models(results):
        raise ExperimentError("--results must hold one whole test seed at least, got none; do more runs first")
    drawn = pictures.save(figures.FIGURES, results, docs / "images")
    write_text(docs / PAGE, page(results))
    write_text(docs / TABLES, tables(results))
    return [docs / PAGE, docs / TABLES, *drawn]


def page(results: Results) -> str:
    every = [Arms(results, model) for model in figures.models(results)]
    parts = [
        "<!-- made by `python -m studies.learning_rates page`; change studies/learning_rates/page.py -->",
        "# Learning rates",
        "Does a router that is held back stand higher learning rates, and is it the spectrum that matters?\n"
        f"{_setting(every)} The protocol (`studies/learning_rates/study.toml`) was fixed before the test runs.",
        lead(every),
        f"![Validation loss against the learning rate, an arm a curve](images/learning_rates.png)\n\n{_caption()}",
        *seen_afterwards(every),
        *(answer(arms) for arms in every),
        "## Arms\n\n" + arms_table(results, every),
        f"All outcomes, all rates: [tables](learning_rates_tables.md). Made by `{COMMAND} run` and `{COMMAND} page`.",
    ]
    return "\n\n".join(parts) + "\n"


def answer(arms: Arms) -> str:
    """An outcome a line, against doing nothing: who is shown to be better or worse, and which claim survives."""
    tests = claims.all_tests(arms)
    head = f"## {arms.model}: {len(arms.seeds)} seeds"
    lines = []
    for outcome in OUTCOMES[:5]:
        found = tests[outcome.name]
        better = sorted((t for t in found.values() if t.verdict == SHOWN[1]), key=_mean)
        worse = sorted((t for t in found.values() if t.verdict == SHOWN[-1]), key=_mean)
        text = f"**{outcome.says[0].upper()}{outcome.says[1:]}.** "
        if outcome.name == "dead":
            level = interval(list(arms.outcome(BASE, "dead").values()))
            text += f"Without anything {level['mean']:.1f} ± {level['ci95']:.1f} of {arms.experts}. "
        text += f"Shown to be lower: {_list(better, outcome)}." if better else "Not shown to be lower in any arm."
        if worse:
            text += f" Shown to be higher: {_list(worse, outcome)}."
        if better or worse:
            text += f" Claim that survives: {claims.survives(arms, outcome.name)}."
        lines.append(f"- {text}")
    return "\n".join([head, "", *lines])


def seen_afterwards(every: list[Arms]) -> list[str]:
    asked = clipping.MODEL in [arms.model for arms in every]
    return [f'!!! note "The left end of the curves"\n\n    {clipping.said()}'] if asked else []


def lead(every: list[Arms]) -> str:
    """What is shown in every model, by the same rule whatever the results."""
    shown = {outcome.name: _in_every(every, outcome.name) for outcome in OUTCOMES}
    models = f"all {len(every)} models" if len(every) > 1 else "this model"
    losses = [f"{outcome.says}: {_or_none(shown[outcome.name])}" for outcome in OUTCOMES[:4]]
    return (
        f"**In {models} shown to be lower than without anything** ({', '.join(arms.model for arms in every)}):\n\n- "
        + "\n- ".join([*losses, f"dead experts: **{_or_none(shown['dead'])}**"])
        + "\n\nA paired test over the seeds, corrected for the number of arms (Holm); “not shown” is no proof of nothing."
    )


def _in_every(every: list[Arms], outcome: str) -> list[str]:
    shown = [{arm for arm, test in claims.against_none(arms, outcome).items() if test.verdict == SHOWN[1]} for arms in every]
    return [arm for arm in every[0].arms if all(arm in of_model for of_model in shown)]


def _or_none(arms: list[str]) -> str:
    return ", ".join(arms) if arms else "no arm"


def arms_table(results: Results, every: list[Arms]) -> str:
    head = ["arm", "what it is", *(f"strength, {arms.model}" for arms in every)]
    rows = [
        [
            arm,
            settings["says"].replace("|", "\\|"),
            *_strengths(every, arm, settings),
        ]
        for arm, settings in results["protocol"]["arms"].items()
        if all(arm in arms.arms for arms in every)
    ]
    return words(head, rows)


def _strengths(every: list[Arms], arm: str, settings: dict[str, object]) -> list[str]:
    return [f"{arms.strength(arm):g}" if "strengths" in settings else "–" for arms in every]


def tables(results: Results) -> str:
    parts = ["---\nsearch:\n  exclude: true\n---\n\n# Learning rates: tables", f"From saved runs, by `{COMMAND} page`."]
    for model in figures.models(results):
        arms = Arms(results, model)
        tests = claims.all_tests(arms)
        head = ["arm", "best rate", *(outcome.says for outcome in OUTCOMES)]
        rows = [[arm, f"{arms.best_rate(arm):g}", *(_level(arms, arm, outcome) for outcome in OUTCOMES)] for arm in arms.arms]
        parts.append(f"## {model}, {len(arms.seeds)} seeds\n\n### Levels\n\n{table(head, rows)}")
        rows = [
            [arm, *(_difference(tests[outcome.name][arm], outcome) for outcome in OUTCOMES)] for arm in arms.arms if arm != BASE
        ]
        head = ["arm", *(outcome.says for outcome in OUTCOMES)]
        parts.append(f"### Difference to none, p after Holm, verdict\n\n{table(head, rows)}")
        head = ["arm", *(f"rate {rate:g}" for rate in arms.rates), "diverged"]
        rows = [
            [arm, *(_spread(list(arms.values(arm, rate).values()), ".3f") for rate in arms.rates), str(arms.diverged(arm))]
            for arm in arms.arms
        ]
        parts.append(f"### Loss at every rate, nats/byte\n\n{table(head, rows)}")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts.append(f"Mean ± half-width of the 95 % interval over the seeds (Student's t). {versions}.")
    return "\n\n".join(parts) + "\n"


def _setting(every: list[Arms]) -> str:
    seeds = " and ".join(f"{len(arms.seeds)} on {arms.model}" for arms in every)
    first = every[0]
    return (
        f"Small language models, {len(first.rates)} rates from {first.rates[0]:g} to {first.rates[-1]:g}, {len(first.arms)} "
        f"arms, each with its one strength tuned alike on seeds of its own; seeds: {seeds}."
    )


def _caption() -> str:
    drawn = ", ".join(arm for arm in figures.DRAWN)
    return f"*Coloured: {drawn}. Grey: the other arms. Lower is better; flat to the right is robust.*"


def _mean(test: Test) -> float:
    return test.difference.mean if test.difference else 0.0


def _list(tests: list[Test], outcome: Outcome) -> str:
    return ", ".join(f"{test.arm} {_mean(test):+{outcome.form}} ± {_half(test):{outcome.form}}" for test in tests)


def _half(test: Test) -> float:
    return (test.difference.half or 0.0) if test.difference else 0.0


def _level(arms: Arms, arm: str, outcome: Outcome) -> str:
    return _spread(list(arms.outcome(arm, outcome.name).values()), outcome.form)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "beyond the rates"
    found = interval(list(values))
    return f"{found['mean']:{form}}" + ("" if found["ci95"] is None else f" ± {found['ci95']:{form}}")


def _difference(test: Test, outcome: Outcome) -> str:
    if test.difference is None:
        return "beyond the rates"
    return f"{_mean(test):+{outcome.form}} ± {_half(test):{outcome.form}}, {chance(test.p)}, {test.verdict}"
