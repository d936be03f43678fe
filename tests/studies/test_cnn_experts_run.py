"""Whole runs of the study of convolutional experts, small ones: what they leave, and that they resume to the same."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from image_runs import CLASSES, make_photos
from PIL import Image

from studies.cnn_experts import config, figures, study, train
from studies.cnn_experts.__main__ import main
from studies.cnn_experts.config import ARMS

pytestmark = pytest.mark.slow

FLAGS = (
    "--samples-per-class=20 --epochs=3 --seeds=2 --batch-size=14 --width=4 --image-size=10 --experts=3 --top-k=2 --lr=0.01 "
    "--relative-bound=0.1 --mean-bound=0.05"
)
PICTURES = ["class_weights", "fixed_expert", "gate_scores", "load", "training"]
ARM_FIGURES = ["importance_cv2", "load_cv2", "experts_used", "purity", "mutual_information", "fixed_used", "own_best"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return make_photos(tmp_path_factory.mktemp("photos"), CLASSES)


def command(photos: str, out: Path, *more: str) -> list[str]:
    return ["--data", photos, "--out", str(out), *FLAGS.split(), *more]


class Run(NamedTuple):
    out: Path
    results: dict
    printed: str


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Run:
    out, printed = tmp_path_factory.mktemp("run") / "new", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        assert main(command(photos, out)) == 0
    return Run(out, json.loads((out / "results.json").read_text()), printed.getvalue())


def test_every_file_is_there_and_none_too_many(run):
    names = [f"{arm}-seed{seed}" for arm in ARMS for seed in (0, 1)]
    expected = {"config.json", "results.json", "tables.md", ".lock"} | {f"figures/{name}.png" for name in PICTURES}
    expected |= {f"models/{name}.pt" for name in names} | {f"parts/{name}.json" for name in names}
    assert {path.relative_to(run.out).as_posix() for path in run.out.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_something(run, name):
    with Image.open(run.out / "figures" / f"{name}.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_results_say_what_was_run(run, photos):
    results = run.results
    assert config.Config(**results["config"]) == config.parse(command(photos, run.out))[0]
    assert results["data"]["images"] == {"train": 42, "val": 9, "test": 9}
    assert set(results["summary"]) == set(ARMS)
    for arm, parts in results["runs"].items():
        assert [part["seed"] for part in parts] == [0, 1]
        assert [[row["epoch"] for row in part["history"]] for part in parts] == 2 * [[1, 2, 3]]
        assert ("constraint" in parts[0]) == bool(ARMS[arm].constraint)
        assert all((name in results["summary"][arm]) == ARMS[arm].moe for name in ARM_FIGURES)
    for claim in results["claims"]:
        assert claim["rows"]
        for row in claim["rows"]:
            assert row["verdict"] in ("shown", "refuted", "not shown")


@pytest.mark.parametrize("arm", ARMS)
def test_saved_networks_give_the_figures_told_of_them(run, photos, arm):
    settings = config.parse(command(photos, run.out))[0]
    images, splits = study.images(settings)
    for seed, told in enumerate(run.results["runs"][arm]):
        network = train.build(settings, arm, seed, images, torch.device("cpu"))
        network.load_state_dict(torch.load(run.out / "models" / f"{arm}-seed{seed}.pt", weights_only=True)["network"])
        test = splits[seed].test
        logits, routed = train.predict(network, images.images[test])
        assert told["accuracy"] == pytest.approx(100 * float((logits.argmax(-1) == images.labels[test]).float().mean()))
        if routed is not None:
            assert told["routing"]["load"] == pytest.approx((routed.weights > 0).float().mean(0).tolist())
            for expert, accuracy in enumerate(told["fixed_expert"]["each"]):
                alone, _ = train.predict(network, images.images[test], expert)
                right = (alone.argmax(-1) == images.labels[test]).float().mean()
                assert accuracy == pytest.approx(100 * float(right))


@pytest.mark.parametrize("arm", ["relative", "mean"])
def test_hard_constraints_act_and_are_saved(run, arm):
    for seed, part in enumerate(run.results["runs"][arm]):
        saved = torch.load(run.out / "models" / f"{arm}-seed{seed}.pt", weights_only=True)["network"]
        importance = saved["layer4.constraint.importance"]
        assert importance.any()
        assert importance.sum() == pytest.approx(0 if arm == "relative" else 1, abs=1e-5)
        assert 0 < part["constraint"]["steps_with_closed"] <= 100
        assert 0 < part["constraint"]["closed"] < part["constraint"]["steps_with_closed"]
        assert part["constraint"]["largest_excess"] > 0
        # two of three experts an image
        assert all(sum(row["importance"]) == pytest.approx(1, abs=1e-5) for row in part["history"])


def test_tables_show_what_the_results_say(run):
    lines = (run.out / "tables.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    found = [run.results["summary"][arm] for arm in ARMS]
    accuracies, loads = [of["accuracy"] for of in found], [of.get("load_cv2") for of in found]
    assert rows["Test accuracy, %"] == [f"{of['mean']:.2f} ± {of['ci95']:.2f}" for of in accuracies]
    assert rows["Load CV²"] == ["–" if of is None else f"{of['mean']:.3f} ± {of['ci95']:.3f}" for of in loads]
    for claim in run.results["claims"]:
        assert rows[claim["claim"]][-1] == claim["verdict"]
    squeezed = re.sub(r"[\s│┃]+", " ", run.printed)
    assert "The paper's claims" in squeezed
    assert str(run.out / "results.json") in run.printed


@pytest.mark.parametrize("saves", [1, 3, 8])
def test_a_run_that_was_stopped_ends_the_same(run, photos, tmp_path, capsys, monkeypatch, saves):
    real, seen = train.save_checkpoint, itertools.count(1)

    def stopping(*arguments):
        real(*arguments)
        if next(seen) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(figures, "draw", lambda *_: [])
    arms = ["--arms", "kl", "relative", "mean", "--seeds=1"]
    monkeypatch.setattr(train, "save_checkpoint", stopping)
    assert main(command(photos, tmp_path, *arms)) == 130
    told = " ".join(capsys.readouterr().err.split())  # the terminal's width breaks it
    assert "stopped; the same command, with --resume and without --overwrite, goes on from here" in told
    monkeypatch.setattr(train, "save_checkpoint", real)
    assert main(command(photos, tmp_path, *arms, "--resume")) == 0
    for arm in ("kl", "relative", "mean"):
        assert (tmp_path / "parts" / f"{arm}-seed0.json").read_bytes() == (run.out / "parts" / f"{arm}-seed0.json").read_bytes()


def test_another_run_is_neither_overwritten_nor_continued(run, photos, capsys):
    before = (run.out / "results.json").read_bytes()
    assert main(command(photos, run.out)) == 1
    assert "already holds a run; pass --resume, --overwrite, or another --out" in capsys.readouterr().err
    assert main(command(photos, run.out, "--resume", "--gate=conv")) == 1
    assert "--gate was gap-fc, is conv" in capsys.readouterr().err
    assert (run.out / "results.json").read_bytes() == before


def test_a_run_goes_on_with_another_arm(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    flags = ["--seeds=1", "--epochs=1"]
    assert main(command(photos, tmp_path, *flags, "--arms", "plain")) == 0
    before = (tmp_path / "parts" / "plain-seed0.json").stat().st_mtime_ns
    assert main(command(photos, tmp_path, *flags, "--resume", "--arms", "plain", "quiet")) == 0
    assert (tmp_path / "parts" / "plain-seed0.json").stat().st_mtime_ns == before
    assert set(json.loads((tmp_path / "results.json").read_text())["runs"]) == {"plain", "quiet"}


def test_too_few_images_are_told(photos, tmp_path, capsys):
    assert main(command(photos, tmp_path, "--samples-per-class=30")) == 1
    assert "every class needs at least 30 images, got 22 in class 'bar'; add images" in capsys.readouterr().err


def test_one_seed_and_the_plain_network_alone(photos, tmp_path, capsys):
    assert main(command(photos, tmp_path, "--arms", "plain", "--seeds=1", "--epochs=1")) == 0
    assert "One seed: no intervals." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["training.png"]
    assert {claim["verdict"] for claim in json.loads((tmp_path / "results.json").read_text())["claims"]} == {"not run"}
