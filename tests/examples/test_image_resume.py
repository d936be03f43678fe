"""Runs repeat to the byte; stopped anywhere, in any way, they resume to the same bytes."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import without_pictures
from PIL import Image

from examples.image_classification import experiment, figures, train
from examples.image_classification.__main__ import main
from examples.shared import storage

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
# rates at which so few steps learn something, and one update disturbs something: equal zeros would prove little
FLAGS = (
    "--samples-per-class=20 --novel=2 --epochs=2 --seeds=2 --batch-size=16 --dim=8 --hidden=8 --image-size=16 "
    "--lr=0.01 --oneshot-lr=0.05 --sigma-target=initial --routers baseline spectral"
)
# some seconds, in which a signal arrives
LONG = FLAGS.replace("--epochs=2", "--epochs=40").replace("--seeds=2", "--seeds=1")
EPOCH_SAVES, ONESHOT_SAVES = 2 * 2 * 2, 2 * 2 * (2 * 2 + 1)  # seeds, routers; epochs, or novel images and the end of a part
KEPT = ("config.json", "results.json", "tables.md")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, level in (("dark", 110), ("light", 145)):
        (root / name).mkdir()
        for number in range(22):
            pixels = generator.normal(level, 60, (16, 16, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    with without_pictures():
        yield


def command(photos: str, out: Path, flags: str = FLAGS) -> list[str]:
    return ["--data", photos, "--out", str(out), *flags.split()]


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves, byte for byte; models are compared by what follows from them."""
    found = {name: (out / name).read_bytes() for name in KEPT}
    return found | {path.name: path.read_bytes() for path in (out / "parts").iterdir()}


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert main(command(photos, out)) == 0
    return out


@pytest.fixture(scope="module")
def whole(finished) -> dict[str, bytes]:
    return files(finished)


@pytest.fixture(scope="module")
def whole_long(photos, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("long")
    assert main(command(photos, out, LONG)) == 0
    return files(out)


def after(real: Callable, calls: int, error: BaseException, counts: Callable = lambda *_: True) -> Callable:
    """`real`, which works; at the end of the given one of the calls that count, the error."""
    seen = itertools.count(1)

    def stopping(*arguments):
        real(*arguments)
        if counts(*arguments) and next(seen) == calls:
            raise error

    return stopping


def test_the_same_command_gives_the_same_bytes(whole, photos, tmp_path):
    assert main(command(photos, tmp_path)) == 0
    assert files(tmp_path) == whole


def test_a_part_depends_on_its_router_and_seed_only(whole, photos, tmp_path):
    # not on which other routers or how many seeds are run before it
    assert main(command(photos, tmp_path, f"{FLAGS} --routers spectral --seeds=2")) == 0
    for seed in (0, 1):
        assert (tmp_path / "parts" / f"spectral-seed{seed}.json").read_bytes() == whole[f"spectral-seed{seed}.json"]


# --- Ctrl-C


def test_stopped_after_epochs(whole, photos, tmp_path, monkeypatch, capsys):
    """After the first, second, third, fifth and last of all, each time resumed."""
    for calls in np.diff([0, 1, 2, 3, 5, EPOCH_SAVES]):
        with monkeypatch.context() as patch:
            patch.setattr(train, "save_checkpoint", after(storage.save_checkpoint, calls, KeyboardInterrupt()))
            assert main([*command(photos, tmp_path), "--resume"]) == 130
        assert "--resume" in capsys.readouterr().err
        assert not (tmp_path / "results.json").exists()
    assert main([*command(photos, tmp_path), "--resume"]) == 0
    assert files(tmp_path) == whole


def test_stopped_after_oneshot_updates(whole, photos, tmp_path, monkeypatch):
    """After one within a part, several, the end of a part, and the end of the last; each time resumed."""
    for calls in np.diff([0, 1, 4, 5, 8, 13, ONESHOT_SAVES]):
        stopping = after(storage.write_json, calls, KeyboardInterrupt(), lambda path, _: path.parent.name == "parts")
        with monkeypatch.context() as patch:
            patch.setattr(experiment, "write_json", stopping)
            assert main([*command(photos, tmp_path), "--resume"]) == 130
    assert main([*command(photos, tmp_path), "--resume"]) == 0
    assert files(tmp_path) == whole


def test_stopped_at_every_save_one_after_the_other(whole, photos, tmp_path, monkeypatch):
    """Each time half-way into a write: what it was to replace stays, and the temporary file left behind does no harm."""
    sync = os.fsync
    for start in range(EPOCH_SAVES + ONESHOT_SAVES + 1):
        assert not (tmp_path / "results.json").exists()
        with monkeypatch.context() as patch:
            # the very first write is that of config.json; then one is finished, and the next is cut short
            patch.setattr(os, "fsync", after(sync, 2 if start else 3, KeyboardInterrupt()))
            assert main([*command(photos, tmp_path), "--resume"]) == 130
        assert list(tmp_path.rglob(".*.partial"))
    assert (tmp_path / "results.json").exists()
    assert main([*command(photos, tmp_path), "--resume"]) == 0
    assert files(tmp_path) == whole


def epochs_done(out: Path) -> int:
    """Zero while the checkpoint is not there, or is half replaced."""
    found = list(out.glob("models/baseline-seed0.pt"))
    return len(storage.load_checkpoint(found[0], torch.device("cpu"))["history"]) if found else 0


def test_a_process_stopped_from_outside(whole_long, photos, tmp_path):
    """By Ctrl-C, then, resumed, with no word of warning, then resumed to its end."""
    # a job that a script put into the background ignores SIGINT, and its children inherit that: listen all the same
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('examples.image_classification', run_name='__main__')"
    )
    arguments = [sys.executable, "-c", program, *command(photos, tmp_path, LONG), "--resume"]
    for kill, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = epochs_done(tmp_path)
        process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 120
            while epochs_done(tmp_path) == before:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(kill)
            _, messages = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == status
        assert "Traceback" not in messages
        assert ("with --resume and without --overwrite, goes on from here" in messages) == (kill == signal.SIGINT)
        assert not (tmp_path / "results.json").exists()
    assert main([*command(photos, tmp_path, LONG), "--resume"]) == 0
    assert files(tmp_path) == whole_long


# --- a failing disk


def half_written(state, path) -> None:
    """What torch.save does on a full disk, text included."""
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")


def no_space(*_, **__) -> None:
    raise OSError(28, "No space left on device")


FAILURES = [
    (torch, "save", no_space, "models/baseline-seed0.pt"),
    (torch, "save", half_written, "models/baseline-seed0.pt"),
    (os, "fsync", no_space, "models/baseline-seed0.pt"),
    (Path, "write_text", no_space, "parts/baseline-seed0.json"),
    (Path, "write_text", no_space, "results.json"),
    (Path, "write_text", no_space, "tables.md"),
]


def test_a_failing_disk_loses_nothing_that_was_saved(whole, photos, tmp_path, monkeypatch, capsys):
    """In the order in which a run would meet them, each time resumed."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", after(storage.save_checkpoint, 1, KeyboardInterrupt()))
        assert main(command(photos, tmp_path)) == 130
    checkpoint = tmp_path / "models" / "baseline-seed0.pt"
    saved = checkpoint.read_bytes()
    for owner, name, broken, file in FAILURES:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(owner, name, broken, tmp_path / file))
            assert main([*command(photos, tmp_path), "--resume"]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"error: cannot write {tmp_path / file}: ")
        assert "--resume" in line
        assert (checkpoint.read_bytes() == saved) == file.startswith("models")
        assert not (tmp_path / file).exists() or file.startswith("models")
        assert not list(tmp_path.rglob(".*.partial"))
    assert main([*command(photos, tmp_path), "--resume"]) == 0
    assert files(tmp_path) == whole


def failing(owner: object, name: str, broken: Callable, file: Path) -> Callable:
    """`owner.name`, but `broken` for what it does to the temporary file of this one."""
    real, temporary = getattr(owner, name), file.with_name(f".{file.name}.partial")

    def fails(*arguments, **options):
        if owner is os:
            hit = temporary.exists() and os.path.samestat(os.fstat(arguments[0]), temporary.stat())
        else:
            hit = temporary in [argument for argument in arguments if isinstance(argument, Path)]
        return (broken if hit else real)(*arguments, **options)

    return fails


# --- --resume and --overwrite


def test_a_run_that_is_there_is_not_touched_unasked(finished, whole, photos, capsys):
    assert main(command(photos, finished)) == 1
    assert f"error: {finished} already holds a run; pass --resume, --overwrite, or another --out" in capsys.readouterr().err
    assert files(finished) == whole


def test_resuming_a_finished_run_only_draws_it_again(finished, whole, photos, monkeypatch, capsys):
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "_train_epoch", None)
        patch.setattr("examples.image_classification.oneshot._update", None)
        patch.setattr(figures, "draw", lambda results, folder: drawn.append(folder) or [])
        assert main([*command(photos, finished), "--resume"]) == 0
    assert drawn == [finished / "figures"]
    assert files(finished) == whole
    assert "Routing and spectra" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(finished, whole, photos, capsys):
    changed = f"{FLAGS} --epochs=3 --temperature=0.5 --routers spectral"
    assert main([*command(photos, finished, changed), "--resume"]) == 1
    error = capsys.readouterr().err
    assert f"--resume needs the settings that the run in {finished} began with" in error
    for part in (
        "--routers was ['baseline', 'spectral'], is ['spectral']",
        "--temperature was auto, is 0.5",
        "--epochs was 2, is 3",
    ):
        assert part in error
    assert "--lr" not in error
    assert files(finished) == whole


def test_overwrite_starts_anew(finished, whole, photos):
    (finished / "my notes.txt").write_text("keep")
    (finished / "parts" / "stale.json").write_text("{}")
    assert main([*command(photos, finished), "--overwrite"]) == 0
    assert files(finished) == whole
    assert (finished / "my notes.txt").read_text() == "keep"


def test_overwrite_and_resume_work_where_nothing_is_yet(whole, photos, tmp_path):
    for flag in ("--resume", "--overwrite"):
        assert main([*command(photos, tmp_path / flag), flag]) == 0
        assert files(tmp_path / flag) == whole
