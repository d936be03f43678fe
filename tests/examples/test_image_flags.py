"""The example's flags: each setting has one, presets are the paper's, explicit flags win."""

import dataclasses
import re

import pytest

from examples.image_classification.__main__ import main
from examples.image_classification.config import PRESETS, Config, parse

FIELDS = {item.name: item for item in dataclasses.fields(Config)}
# a value that is not the default for each field, as typed and as parsed
OTHER = {
    "data": ("photos", "photos"),
    "classes": ("4 7", ["4", "7"]),
    "image_size": ("20", 20),
    "samples_per_class": ("30", 30),
    "novel": ("3", 3),
    "augment": ("flip", "flip"),
    "layers": ("5", 5),
    "experts": ("7", 7),
    "dim": ("9", 9),
    "hidden": ("11", 11),
    "stem_norm": ("none", "none"),
    "routers": ("clustering-balance baseline+spectral", ["clustering-balance", "baseline+spectral"]),
    "temperature": ("0.5", 0.5),
    "metric": ("dot", "dot"),
    "prototypes": ("data", "data"),
    "residual": ("", True),
    "penalty": ("mhe", "mhe"),
    "balance": ("kl", "kl"),
    "alpha": ("0.25", 0.25),
    "beta": ("0", 0.0),
    "sigma_target": ("initial", "initial"),
    "rank_target": ("1.5", 1.5),
    "relative": ("", True),
    "bound": ("0.1", 0.1),
    "bias_rate": ("0.01", 0.01),
    "seeds": ("2", 2),
    "epochs": ("4", 4),
    "batch_size": ("2", 2),
    "lr": ("1e-2", 0.01),
    "gate_lr_scale": ("0.1", 0.1),
    "scope": ("path", "path"),
    "oneshot_optimizer": ("sgd", "sgd"),
    "oneshot_lr": ("0.5", 0.5),
    "oneshot_steps": ("2", 2),
    "anchor": ("0", 0),
    "device": ("cuda:1", "cuda:1"),
    "compile": ("", True),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_flag_that_changes_it_and_nothing_else(name):
    typed, value = OTHER[name]
    config, _ = parse([flag(name), *typed.split()])
    assert config == dataclasses.replace(Config(), **{name: value})
    assert config != Config()


def test_no_flags_are_the_defaults():
    config, options = parse([])
    assert config == Config()
    assert config.routers == ["baseline", "clustering", "spectral"]
    assert (str(options.out), options.resume, options.overwrite) == ("runs/image_classification", False, False)


def test_words_and_numbers_where_both_are_allowed():
    assert parse(["--temperature", "auto"])[0].temperature == "auto"
    assert parse(["--sigma-target", "2.5"])[0].sigma_target == 2.5
    assert parse(["--relative", "--no-relative"])[0].relative is False


def test_where_results_go_is_no_setting_of_the_experiment():
    config, options = parse(["--out", "elsewhere", "--resume"])
    assert config == Config()
    assert (str(options.out), options.resume) == ("elsewhere", True)


# layers, experts, images a class: the paper's two tables, and the smaller set-up
@pytest.mark.parametrize(("name", "paper"), [("small", (2, 2, 525)), ("table1", (2, 2, 1600)), ("table2", (4, 4, 1600))])
def test_presets_are_the_papers(name, paper):
    config, _ = parse(["--preset", name])
    assert (config.layers, config.experts, config.samples_per_class) == paper
    assert dataclasses.replace(config, layers=2, experts=2, samples_per_class=None) == Config()


@pytest.mark.parametrize("order", [0, 1])
def test_explicit_flags_beat_the_preset(order):
    # whatever stands first, and also where they equal the default
    parts = [["--preset", "table2"], ["--layers", "2", "--samples-per-class", "90"]]
    config, _ = parse(parts[order] + parts[1 - order])
    assert (config.layers, config.experts, config.samples_per_class) == (2, 4, 90)


@pytest.fixture
def help_text(capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_explains_every_flag_with_its_default(help_text):
    explained = help_text.split(" options: ")[1]
    for name, item in FIELDS.items():
        text = item.metadata["help"]
        assert len(text) > 8
        (entry,) = re.findall(rf" {flag(name)}[ ,].*?\(default: .*?\)", explained)
        assert text.split(" (default")[0] in entry
        if "(default:" not in text:
            shown = " ".join(item.default) if isinstance(item.default, tuple) else str(item.default)
            assert entry.endswith(f"(default: {shown})")


def test_help_names_the_presets_and_where_results_go(help_text):
    for name, settings in PRESETS.items():
        assert f"{name}: {{samples_per_class: {settings['samples_per_class']}" in help_text
    for name in ("--out", "--resume", "--overwrite"):
        assert re.search(rf" {name} .*?[a-z]", help_text)
