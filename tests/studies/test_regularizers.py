"""The study of regularizers end to end: files, repeatability, resuming, messages."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.shared import storage
from studies.regularizers import figures, report, study
from studies.regularizers.__main__ import main
from studies.regularizers.arms import ARMS
from studies.regularizers.claims import CLAIMS
from studies.regularizers.config import parse

pytestmark = pytest.mark.slow

FLAGS = (
    "--train-per-class=4 --val-per-class=3 --epochs=2 --batch-size=4 --widths 4 5 --image-size=12 --seeds=2 --lr=0.02 "
    "--tuning-seeds 7 8 --multiples 0.1 1 --noise 0.5 1"
)
KEPT = ("config.json", "results.json", "tables.md")
STUDIES = ("norm", "energy")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, level in (("dark", 110), ("light", 145)):
        (root / name).mkdir()
        for number in range(12):
            pixels = generator.normal(level, 60, (12, 12, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module")
def no_pictures():
    """They take two seconds a run, and are made anew from the results each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: [])
        yield


def command(name: str, photos: str, out: Path, *flags: str) -> list[str]:
    return [name, "--data", photos, "--out", str(out), *FLAGS.split(), *flags]


def files(out: Path) -> dict[str, bytes]:
    found = {name: (out / name).read_bytes() for name in KEPT}
    return found | {path.name: path.read_bytes() for path in (out / "parts").iterdir()}


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name in STUDIES:
        found[name] = tmp_path_factory.mktemp(name)
        assert main(command(name, photos, found[name])) == 0
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_leaves(finished, name):
    results = json.loads((finished[name] / "results.json").read_text())
    arms = list(ARMS[name])
    assert list(results["runs"]) == sorted(arms)  # keys are sorted in the file
    assert {arm: len(runs) for arm, runs in results["runs"].items()} == dict.fromkeys(arms, 2)
    assert {arm: len(points) for arm, points in results["tuning"].items()} == {arm: 1 + (arm != "none") for arm in arms}
    assert len(results["claims"]) == len(CLAIMS[name])
    assert results["data"]["images"] == {"train": 8, "val": 6, "test": 10}
    for run in itertools.chain.from_iterable(results["runs"].values()):
        assert run["gap_accuracy"] == pytest.approx(run["train_accuracy"] - run["test_accuracy"])
        assert run["gap_loss"] == pytest.approx(run["test_loss"] - run["train_loss"])
        assert len(run["history"]) == 2
        assert len(run["noise_accuracy"]) == 2
        assert len(run["sigma"]) == len(run["energy"]) == len(run["half_energy"]) == 3
    # a run is made once: two tuning seeds for each point, two reported seeds
    points = sum(len(points) for points in results["tuning"].values())
    assert len(list((finished[name] / "parts").iterdir())) == 2 * points + 2 * len(arms)
    drawn = {"norm": ["coefficients", "gap", "noise", "sigma"], "energy": ["coefficients", "energy", "error"]}
    assert sorted(path.stem for path in (finished[name] / "figures").iterdir()) == drawn[name]
    text = (finished[name] / "tables.md").read_text()
    for heading in ("Claims", "Results", "Coefficients", "Paired differences from none", "Layers"):
        assert f"### {heading}" in text
    for claim in results["claims"]:
        assert f"{claim['arm']} {claim['direction']} than {claim['against']}" in text


def test_reported_runs_have_the_chosen_coefficient(finished):
    results = json.loads((finished["norm"] / "results.json").read_text())
    for arm, runs in results["runs"].items():
        chosen = results["chosen"][arm]
        assert {run["multiple"] for run in runs} == {chosen["multiple"]}
        points = results["tuning"][arm]
        assert max(point["val_accuracy"] for point in points) == next(
            point["val_accuracy"] for point in points if point["multiple"] == chosen["multiple"]
        )
        assert chosen["coefficient"] == pytest.approx(chosen["multiple"] * (ARMS["norm"][arm].published or 0))


@pytest.mark.parametrize("name", STUDIES)
def test_the_same_command_gives_the_same_bytes(finished, photos, tmp_path, no_pictures, name):
    assert main(command(name, photos, tmp_path)) == 0
    assert files(tmp_path) == files(finished[name])


@pytest.mark.parametrize("calls", [1, 5, 14, 18, 22])
def test_stopped_after_a_run(finished, photos, tmp_path, monkeypatch, capsys, no_pictures, calls):
    seen = itertools.count(1)

    def stopping(path, value):
        storage.write_json(path, value)
        if next(seen) == calls:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "write_json", stopping)
        assert main(command("norm", photos, tmp_path)) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(list((tmp_path / "parts").iterdir())) == calls
    trained, train = [], study.train
    with monkeypatch.context() as patch:
        patch.setattr(study, "train", lambda *arguments: trained.append(1) or train(*arguments))
        assert main([*command("norm", photos, tmp_path), "--resume"]) == 0
    assert len(trained) == 14 + 8 - calls
    assert files(tmp_path) == files(finished["norm"])


def test_a_study_that_is_there_is_not_touched_unasked(finished, photos, capsys, no_pictures):
    before = files(finished["norm"])
    assert main(command("norm", photos, finished["norm"])) == 1
    assert f"error: {finished['norm']} already holds a run; pass --resume, --overwrite" in capsys.readouterr().err
    assert main(command("norm", photos, finished["norm"], "--epochs=3", "--resume")) == 1
    assert "--epochs was 2, is 3" in capsys.readouterr().err
    assert files(finished["norm"]) == before
    assert main(command("norm", photos, finished["norm"], "--overwrite")) == 0
    assert files(finished["norm"]) == before


def test_some_arms_and_one_seed(photos, tmp_path, capsys):
    flags = ["--arms", "none", "mhe-half", "comhe-angle", "--seeds=1", "--multiples", "1"]
    assert main(command("energy", photos, tmp_path, *flags)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(claim["arm"], claim["against"]) for claim in results["claims"]] == [
        ("mhe-half", "none"),
        ("comhe-angle", "none"),
        ("comhe-angle", "mhe-half"),
    ]
    assert {claim["verdict"] for claim in results["claims"]} == {"not shown: one seed has no interval"}
    assert "One seed: no intervals." in capsys.readouterr().out


def test_runs_that_diverge_are_reported_as_such(photos, tmp_path):
    assert main(command("norm", photos, tmp_path, "--lr=1e30", "--arms", "none", "spectral-norm")) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    verdicts = {claim["metric"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts["gap_loss"] == verdicts["gradient_norm"] == "not shown: a run diverged"
    assert "diverged" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs=0", "--epochs must be at least 1, got 0"),
        ("--seeds=0", "--seeds must be at least 1, got 0"),
        ("--batch-size=1", "--batch-size must be at least 2 (batch norm needs two images), got 1"),
        ("--image-size=7", "--image-size must be at least 8, got 7"),
        ("--widths 4", "--widths must be two or more numbers of at least 1, got 4"),
        ("--lr=0", "--lr must be a finite number above 0, got 0.0"),
        ("--weight-decay=-1", "--weight-decay must be a finite number of at least 0, got -1.0"),
        ("--momentum=1", "--momentum must be at least 0 and below 1, got 1.0"),
        ("--multiples 1 0", "--multiples must be finite numbers above 0, got 1.0 0.0"),
        ("--noise inf", "--noise must be finite numbers above 0, got inf"),
        ("--multiples 1 1", "--multiples must be different from each other, got 1.0 1.0"),
        ("--tuning-seeds 9 1", "--tuning-seeds must be none of the 2 seeds that are reported, 0 to 1, got 9 1"),
        ("--arms none mhe", "--arms must be any of none, weight-decay, spectral-norm, spectral-target, got mhe"),
        ("--arms weight-decay", "--arms must be a list with none, which the others are compared with, got weight-decay"),
        ("--device=abacus", "--device must be one that PyTorch can use here"),
        ("--data=nowhere", "--data must be mnist, cifar10 or a folder, got nowhere, which is no folder"),
        ("--classes dark blue", "--classes must be among dark, light, got blue"),
        (
            "--train-per-class=9",
            "every class needs at least 13 images (9 to train on, 3 to choose by, one to test on), got 12 in",
        ),
    ],
)
def test_messages(photos, tmp_path, capsys, flags, message):
    assert main(command("norm", photos, tmp_path / "out", *flags.split())) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_defaults(capsys):
    for arguments in (["--help"], ["norm", "--help"], ["energy", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            parse(arguments)
        assert stopped.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines end at hyphens too
    assert "anyof:none,mhe,mhe-half,comhe-random,comhe-angle,comhe-adversarial(default:all)" in text
    with pytest.raises(SystemExit):
        parse([])
    norm, options = parse(["norm"])
    energy, _ = parse(["energy"])
    assert (norm.batch_norm, norm.weight_decay, energy.batch_norm, energy.weight_decay) == (False, 0.0, True, 5e-4)
    assert norm.source().classes == [str(digit) for digit in range(10)]
    assert (str(options.out), options.resume, options.overwrite) == ("runs/regularizers/norm", False, False)


def test_every_number_in_a_table_has_a_name():
    assert list(report.NAMES) == list(study.SCALARS)
