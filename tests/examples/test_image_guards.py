"""What keeps a long run honest: the images it began with, damaged files, a run that diverges."""

import json
import math
import shutil
from pathlib import Path

import pytest
from image_runs import CLASSES, make_photos
from pictures import without_pictures

from examples.image_classification.__main__ import main
from examples.shared import runs, storage

pytestmark = pytest.mark.slow

FLAGS = "--samples-per-class=20 --novel=2 --epochs=2 --seeds=1 --batch-size=16 --dim=16 --hidden=16 --image-size=16"


def command(photos: str, out: Path, *more: str) -> list[str]:
    return ["--data", photos, "--out", str(out), *FLAGS.split(), "--routers", "spectral", *more]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return make_photos(tmp_path_factory.mktemp("photos"), CLASSES)


@pytest.fixture(scope="module")
def done(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for tests that change a copy of it, or nothing in it."""
    out = tmp_path_factory.mktemp("done")
    with without_pictures():
        assert main(command(photos, out)) == 0
    return out


@pytest.mark.usefixtures("no_pictures")
def test_resuming_on_other_images_is_refused(photos, tmp_path, capsys):
    # one file more redraws every split: what was trained on would be tested on
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos, images)
    assert main(command(str(images), out)) == 0
    shutil.copy(images / "dot" / "0.png", images / "dot" / "new.png")
    capsys.readouterr()
    assert main(command(str(images), out, "--resume")) == 1
    message = capsys.readouterr().err
    assert "--resume needs the images that the run in" in message
    assert "--overwrite" in message
    (images / "dot" / "new.png").unlink()
    assert main(command(str(images), out, "--resume")) == 0


def test_a_flag_that_changes_the_images_is_named(done, photos, capsys):
    assert main(command(photos, done, "--resume", "--image-size=20")) == 1
    assert "--image-size was 16, is 20" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "parts/spectral-seed0.json", "models/spectral-seed0.pt"])
def test_a_damaged_file_is_named(done, photos, tmp_path, capsys, name):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    if name.startswith("models"):
        (tmp_path / "parts" / "spectral-seed0.json").unlink()
    (tmp_path / name).write_text("{")
    assert main(command(photos, tmp_path, "--resume")) == 1
    message = capsys.readouterr().err.lstrip()  # the line of the progress bar, which older versions of rich leave empty
    assert message.startswith(f"error: cannot read {tmp_path / name}: ")
    last = "choose another --out" if name == "config.json" else "delete that file, or begin anew with --overwrite"
    assert last in message


def test_a_run_that_diverges_is_reported_and_its_json_is_valid(photos, tmp_path, capsys):
    assert main(command(photos, tmp_path, "--lr=1e30")) == 0
    assert "nan" in capsys.readouterr().out
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    summary = json.loads(text)["summary"]["spectral"]
    assert summary["novel_loss_after"]["mean"] is None
    # what argmax makes of NaN is no answer, right or wrong, and no path
    assert [summary[name]["mean"] for name in ("accuracy", "novel_accuracy_before", "novel_accuracy_after")] == [0, 0, 0]
    assert summary["paths_used"]["mean"] is summary["top_path_share"]["mean"] is None
    # from the saved parts alone, too; one picture of them is enough
    with without_pictures():
        assert main(command(photos, tmp_path, "--lr=1e30", "--resume")) == 0
    assert (tmp_path / "results.json").read_text() == text


def test_no_mean_is_made_of_a_value_that_is_missing():
    assert math.isnan(runs.interval([1.0, None])["mean"])
    assert math.isnan(runs.interval([1.0, math.inf])["ci95"])


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    storage.write_json(tmp_path / "a.json", {"a": [1.5, math.nan, (math.inf, "b")], "c": True})
    assert storage.read_json(tmp_path / "a.json") == {"a": [1.5, None, [None, "b"]], "c": True}


def test_an_abbreviated_flag_is_refused(capsys):
    # --seed 7 would otherwise mean seven seeds
    with pytest.raises(SystemExit, match="2"):
        main(["--seed", "7"])
    assert "unrecognized arguments: --seed 7" in capsys.readouterr().err
