"""The one-shot test of the example, model by model against stacked copies.

    python -m benchmarks.oneshot

Digits are the embedded ones. The photos are random pixels and the networks untrained: neither changes how long it takes. The
loop goes through some of the novel images only, at the same time for each; the table is per novel image and rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split, load, split
from examples.image_classification.oneshot import Record, adapt
from examples.image_classification.train import Trained, build
from studies.oneshot.rule import Rule
from studies.oneshot.stacked import adapt_stacked

from ._harness import Report, device, interleave, parser, progress, publish, show_ms, show_ratio

SCOPES = ("path", "experts", "all")
CLASSES = 4
# what a study compares: every scope with two optimizers at two rates each
STEPS = (("adam", 1e-4), ("adam", 1e-3), ("sgd", 1e-3), ("sgd", 1e-2))
TWELVE = [Rule(scope, optimizer, lr) for scope in SCOPES for optimizer, lr in STEPS]


def digits(config: Config) -> tuple[ImageSet, Split]:
    data = load(config)
    data = data._replace(images=data.images.to(device()), labels=data.labels.to(device()))
    return data, split(data.labels.cpu(), data.classes, config, 0)


def photos(config: Config, side: int, each: int) -> tuple[ImageSet, Split]:
    """Random pixels, split as `each` photos a class are."""
    held_out = CLASSES * each * 15 // 100
    sizes = [CLASSES * each - 2 * held_out, held_out, held_out, CLASSES * config.novel]
    labels = torch.arange(sum(sizes)) % CLASSES
    pixels = torch.randint(256, (len(labels), 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train, val, test, novel = torch.arange(len(labels)).split(sizes)
    names = [str(label) for label in range(CLASSES)]
    data = ImageSet(pixels.to(device()), labels.to(device()), names, [], "none")
    return data, Split(train, val, test, novel.view(-1, CLASSES).T)


def loop(config: Config, trained: Trained, data: ImageSet, parts: Split, rules: Sequence[Rule]) -> list[list[Record]]:
    found = []
    for rule in rules:
        records: list[Record] = []
        one = replace(config, scope=rule.scope, oneshot_optimizer=rule.optimizer, oneshot_lr=rule.lr)
        adapt(one, 0, trained, data, parts, [], records.append)
        found.append(records)
    return found


def compare(
    config: Config, data: ImageSet, parts: Split, rules: Sequence[Rule], looped: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds for each novel image and rule. The loop takes the first `looped` novel images of each class."""
    model, objective = build(config, "spectral", 0, data, device())
    trained = Trained(model.eval(), objective, [])
    few = parts._replace(novel=parts.novel[:, :looped])
    calls: dict[str, Callable[[], object]] = {
        "loop": partial(loop, config, trained, data, few, rules),
        "stacked": partial(adapt_stacked, config, 0, trained, data, parts, rules),
    }
    updates = {"loop": few.novel.numel() * len(rules), "stacked": parts.novel.numel() * len(rules)}
    return {name: [each / updates[name] for each in times] for name, times in interleave(calls, repeats).items()}


def measure(repeats: int, quick: bool) -> list[Report]:
    config = Config(layers=2, experts=2, novel=2) if quick else Config(layers=4, experts=4, novel=25)
    looped = 1 if quick else 3
    report = Report("One-shot test", ["images", "rules", "loop, ms", "stacked, ms", "loop / stacked"])
    sets: dict[str, tuple[ImageSet, Split]] = {"digits, 28 px": digits(config)}
    for side in (16,) if quick else (32, 64):
        sets[f"random photos, {side} px"] = photos(config, side, 80 if quick else 1600)
    cases = [(name, scope, [Rule(scope, "adam", 1e-3)]) for name in sets for scope in SCOPES]
    cases.append((list(sets)[1], "12, of every scope", TWELVE))
    for name, shown, rules in cases:
        progress(f"{name}, {shown}")
        data, parts = sets[name]
        if len(rules) > 1:  # more rules, fewer images
            parts, looped = parts._replace(novel=parts.novel[:, :10]), 1
        seconds = compare(config, data, parts, rules, looped, repeats)
        report.raw[f"{name}, {shown}"] = seconds
        row = [show_ms(seconds["loop"]), show_ms(seconds["stacked"]), show_ratio(seconds, "loop", "stacked", 1)]
        report.rows.append([name, shown, *row])
    held_out = ", ".join(f"{len(parts.test)} of {name}" for name, (_, parts) in sets.items())
    report.notes = [
        f"For each novel image and rule; {CLASSES * config.novel} novel images for one rule; test images: {held_out}; "
        f"{config.layers} layers of {config.experts} experts. The photos are random pixels."
    ]
    return [report]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("oneshot", __doc__, repeats=3).parse_args(argv)
    publish(measure(1 if arguments.quick else arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
