"""Two hundred damages, drawn at random, to what a run has left: one sentence or an exact resume, never a traceback."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import CLASSES, make_photos
from pictures import without_pictures

from examples.image_classification import experiment
from examples.image_classification.__main__ import main
from examples.shared import storage
from examples.shared.command import ExperimentError

TINY = "--samples-per-class=8 --novel=1 --epochs=1 --seeds=2 --batch-size=16 --dim=4 --hidden=4 --image-size=8 --layers=1"
FILES = ("config.json", "parts/spectral-seed0.json", "parts/spectral-seed1.json", "models/spectral-seed1.pt", "results.json")
FOREIGN = ("[]", "{}", "null", "7", '"text"', '{"parts": {"a": 1}}', '[{"seed": 0}]', "[" * 100_000, '{"sha256": 3}', "NaN")


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside of a nested value, as its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(value, key) for key, _ in items]
    return found + [place for container, key in found for place in nodes(container[key])]


def other(value: Any, dice: random.Random) -> Any:
    """A value of another type, or another value."""
    choices: list[Any] = [None, "x", [], {}, -1, 1e308, True, [value], {"a": value}]
    if isinstance(value, torch.Tensor):
        choices += [value.flatten()[:1], value.double() if value.is_floating_point() else value.float(), value + 1]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        choices += [str(value), value + 1, -value - 1]
    return dice.choice(choices)


def inside(value: Any, dice: random.Random) -> Any:
    """The same with something taken away, renamed, put in its place or put beside it."""
    value = copy.deepcopy(value)
    container, key = dice.choice(nodes(value))
    kind = dice.choice(("remove", "swap", "rename", "add"))
    if kind == "swap" or (kind != "remove" and isinstance(container, list)):
        container[key] = other(container[key], dice)
    elif kind == "add":
        container["new"] = container[key]
    else:
        taken = container.pop(key)
        if kind == "rename":
            container[f"{key}_"] = taken
    return value


def damage(file: Path, dice: random.Random) -> str:
    """Do something to the file; what, in words."""
    raw = file.read_bytes()
    kind = dice.choice(("cut", "bits", "bits", "empty", "foreign", "inside", "inside", "inside", "gone", "a folder", "bytes"))
    if kind == "cut":
        file.write_bytes(raw[: dice.randrange(len(raw))])
    elif kind == "bits":
        changed = bytearray(raw)
        for _ in range(dice.choice((1, 1, 2, 20))):
            changed[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        file.write_bytes(bytes(changed))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "foreign":
        file.write_text(dice.choice(FOREIGN))
    elif kind == "bytes":
        file.write_bytes(dice.randbytes(dice.randrange(1, 2000)))
    elif kind == "gone":
        file.unlink()
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif file.suffix == ".json":
        file.write_text(json.dumps(inside(json.loads(raw), dice)))
    else:
        torch.save(inside(torch.load(file, weights_only=True), dice), file)
    return kind


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_photos(tmp_path_factory.mktemp("photos"), CLASSES[:2])


@pytest.fixture(scope="module")
def whole(photos: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as it is after all but its last part: a checkpoint to go on from, parts to read."""
    out = tmp_path_factory.mktemp("whole")
    with without_pictures():
        assert main(command(photos, out)) == 0
    return out


def command(photos: str, out: Path, *more: str) -> list[str]:
    return ["--data", photos, "--out", str(out), *TINY.split(), "--routers", "spectral", *more]


def kept(out: Path) -> dict[str, Any]:
    return {name: json.loads((out / name).read_text()) for name in FILES if name.endswith("json")}


@pytest.fixture
def quick(photos: str, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    """Images are read once, and no table is printed: two hundred runs in a few seconds."""
    monkeypatch.setattr("examples.image_classification.report.write", lambda *_: None)
    known = experiment.read(experiment.Config(data=photos, image_size=8))
    monkeypatch.setattr(experiment, "read", lambda config: known)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore")  # of torch and Python, about what they find in a damaged file
def test_two_hundred_damages(whole: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, ends = kept(whole), {0: 0, 1: 0}
    for seed in range(200):
        dice = random.Random(seed)
        out = tmp_path / str(seed)
        shutil.copytree(whole, out)
        name = dice.choice(FILES)
        if name.startswith("models"):  # else nobody reads it
            (out / "parts" / "spectral-seed1.json").unlink()
        kind = damage(out / name, dice)
        capsys.readouterr()
        status = main(command(photos, out, "--resume"))  # a traceback would come out here
        told = capsys.readouterr().err
        ends[status] += 1
        if status == 0:
            assert kept(out) == expected, f"{seed}: {kind} of {name}"
        else:
            errors = [line for line in told.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, f"{seed}: {kind} of {name}: {told}"
            assert len(errors[0]) > 40
        shutil.rmtree(out)
    assert min(ends.values()) > 20, "both ways out are seen"


def tiny_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, 4, generator=generator) for name in ("a.weight", "b.weight")}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, generator=generator)}}
    return {"model": tensors, "optimizer": {"state": state, "lr": 1e-3}, "history": [{"loss": 0.5, "rank": [1.5, None]}]}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


READERS: dict[str, tuple[Callable[[Path, Any], None], Callable[[Path], Any]]] = {
    "file.json": (storage.write_json, storage.read_json),
    "file.pt": (storage.save_checkpoint, lambda path: storage.load_checkpoint(path, torch.device("cpu"))),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_read_is_what_was_written_or_nothing(name: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    state = tiny_state()
    if name.endswith("json"):
        state = json.loads(json.dumps(state, default=lambda tensor: tensor.tolist()))
    file = tmp_path / name
    told = []
    for seed in range(200):
        write(file, state)
        assert same(read(file), state)
        kind = damage(file, random.Random(seed))
        try:
            assert same(read(file), state), f"{seed}: {kind}"
        except ExperimentError as error:
            told.append(str(error))
        if file.is_dir():
            file.rmdir()
    assert len(told) > 150
    assert all(text.startswith(f"cannot read {file}: ") and "\n" not in text for text in told)


def test_a_fingerprint_knows_types_and_places() -> None:
    values: list[Any] = [1, 1.0, "1", True, None, [1], {"a": 1}, [[1]], {"a": [1]}, [1, 1], {"a": 1, "b": 1}, "", [], {}]
    values += [torch.ones(2), torch.ones(2).double(), torch.ones(1, 2), torch.ones(2, 1), -torch.ones(2), torch.tensor(1)]
    values += [torch.ones(2, dtype=torch.bfloat16), torch.tensor(float("nan")), ["a", "b"], ["ab"], {"a": "b"}, {"ab": ""}]
    assert len({storage.fingerprint(value) for value in values}) == len(values)
    assert storage.fingerprint({"a": 1, "b": 2}) == storage.fingerprint({"b": 2, "a": 1})
