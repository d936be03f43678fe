"""The stacked one-shot test gives the records of the plain one, whatever the rule, the router and the size of a chunk."""

from dataclasses import replace

import pytest
import torch
from oneshot_network import trained

from examples.image_classification import evaluate, oneshot, train
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split
from examples.shared.command import ExperimentError
from studies.oneshot import stacked
from studies.oneshot.rule import Rule
from studies.oneshot.stacked import adapt_stacked

CONFIG = Config(layers=2, experts=3, dim=8, hidden=6, novel=2, anchor=5, batch_size=8, epochs=2, alpha=0.3, beta=0.7)
# rates at which updates flip some of the images held out
RULES = [Rule(scope, *step) for scope in ("all", "experts", "path") for step in (("adam", 0.05), ("sgd", 5.0))]


@pytest.fixture
def data() -> ImageSet:
    labels = torch.arange(96) % 3
    pixels = torch.randint(0, 256, (96, 1, 16, 16)) // 2 + 60 * labels[:, None, None, None]
    return ImageSet(pixels.to(torch.uint8), labels, ["a", "b", "c"], [], "none")


@pytest.fixture
def split() -> Split:
    order = torch.arange(96)
    return Split(order[:24], order[24:60], order[60:90], order[90:].view(2, 3).T)


def plain(config: Config, done: train.Trained, data: ImageSet, split: Split, rule: Rule, seed: int = 0) -> list:
    saved: list[oneshot.Record] = []
    config = replace(config, scope=rule.scope, oneshot_optimizer=rule.optimizer, oneshot_lr=rule.lr)
    oneshot.adapt(config, seed, done, data, split, [], saved.append)
    return saved


def same(ours: list[oneshot.Record], theirs: list[oneshot.Record]) -> None:
    assert [list(record) for record in ours] == [list(record) for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("class", "image", "delta", "right_before", "right_after"):
            assert one[key] == other[key]
            assert type(one[key]) is type(other[key])
        for key in ("loss_before", "loss_after"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(torch.tensor(one["gradient"]), torch.tensor(other["gradient"]))


@pytest.mark.parametrize("router", ["baseline", "clustering", "spectral"])
def test_records_are_those_of_the_plain_loop(data, split, router):
    done = trained(CONFIG, router, data, split)
    before = {name: value.clone() for name, value in done.model.state_dict().items()}
    every = adapt_stacked(CONFIG, 0, done, data, split, RULES)
    assert len(every) == len(RULES)
    for rule, records in zip(RULES, every, strict=True):
        same(records, plain(CONFIG, done, data, split, rule))
        assert any(record["loss_after"] != record["loss_before"] for record in records)
    # the deltas are not all zero, and rules differ
    assert any(record["delta"] for records in every for record in records)
    assert len({tuple(record["loss_after"] for record in records) for records in every}) == len(RULES)
    assert all(torch.equal(value, before[name]) for name, value in done.model.state_dict().items())


@pytest.mark.parametrize(
    "changed",
    [
        {"balance": "bias", "residual": True},
        {"balance": "relative"},
        {"balance": "z", "penalty": "project"},
        {"balance": "mi", "penalty": "comhe", "layers": 3, "anchor": 0},
        {"layers": 1, "experts": 1, "anchor": 1000, "stem_norm": "none"},
    ],
)
def test_records_are_those_of_the_plain_loop_for_other_terms_and_layers(data, split, changed):
    config = replace(CONFIG, **changed)
    done = trained(config, "spectral", data, split)
    rules = [Rule("all", "sgd", 0.5), Rule("experts", "adam", 0.05), Rule("path", "sgd", 0.5)]
    for rule, records in zip(rules, adapt_stacked(config, 3, done, data, split, rules), strict=True):
        same(records, plain(config, done, data, split, rule, seed=3))


def test_validation_images(data, split):
    done = trained(CONFIG, "spectral", data, split)
    rules = [Rule("all", "adam", 0.05), Rule("path", "adam", 0.05)]
    of_val = adapt_stacked(CONFIG, 0, done, data, split, rules, within="val")
    for rule, records in zip(rules, of_val, strict=True):
        same(records, plain(CONFIG, done, data, split._replace(test=split.val), rule))
    assert of_val != adapt_stacked(CONFIG, 0, done, data, split, rules)


def test_several_rules_at_once_are_those_rules_one_by_one(data, split):
    done = trained(CONFIG, "clustering", data, split)
    rules = [*RULES, Rule("path", "adam", 0.001), RULES[0]]
    together = adapt_stacked(CONFIG, 0, done, data, split, rules)
    assert together == [adapt_stacked(CONFIG, 0, done, data, split, [rule])[0] for rule in rules]
    assert adapt_stacked(CONFIG, 0, done, data, split, []) == []
    # what a summary reads
    assert oneshot.summarize(together[0], data.classes)["novel_loss_after"] != 0


def test_the_sizes_of_the_chunks_change_nothing(data, split, monkeypatch):
    done = trained(CONFIG, "spectral", data, split)
    whole = adapt_stacked(CONFIG, 0, done, data, split, RULES)
    # uneven chunks: of copies 4 + 2, of their forward one copy with 7 images, of the stem fewer images than an update has
    for module, name, size in ((stacked, "COPIES", 4), (stacked, "PAIRS", 7), (evaluate, "PIXELS", 4 * 16 * 16)):
        monkeypatch.setitem(getattr(module, name), "cpu", size)
    for ours, theirs in zip(adapt_stacked(CONFIG, 0, done, data, split, RULES), whole, strict=True):
        same(ours, theirs)


def test_logits_that_are_not_finite_are_never_right(data, split):
    done = trained(CONFIG, "baseline", data, split)
    with torch.no_grad():
        done.model.head.bias[1] = torch.inf
    for rule in (Rule("experts", "sgd", 0.02), Rule("all", "sgd", 0.02)):
        (records,) = adapt_stacked(CONFIG, 0, done, data, split, [rule])
        theirs = plain(CONFIG, done, data, split, rule)
        assert [record["delta"] for record in records] == [record["delta"] for record in theirs] == [0.0] * 6


def test_more_than_one_step_and_wrong_rules_are_refused(data, split):
    done = trained(CONFIG, "baseline", data, split)
    with pytest.raises(ExperimentError, match=r"--oneshot-steps must be 1 for stacked copies, got 3; use oneshot\.adapt"):
        adapt_stacked(replace(CONFIG, oneshot_steps=3), 0, done, data, split, RULES)
    with pytest.raises(ExperimentError, match="--scope must be one of all, experts, path, got head"):
        adapt_stacked(CONFIG, 0, done, data, split, [Rule("head", "adam", 0.02)])
