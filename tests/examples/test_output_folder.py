"""--out: whose folder it is, what --overwrite may delete, who works on it, with which versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from examples.shared import runs, storage
from examples.shared.command import ExperimentError, Options
from examples.shared.runs import prepare

SETTINGS = {"dim": 8, "data": "mnist", "digest": "a"}


def begin(out: Path, *, resume: bool = False, overwrite: bool = False, **changes: Any) -> list[dict[str, str]]:
    options = Options(out, resume, overwrite)
    with options.held:
        return prepare(SETTINGS | changes, options)


def ours(out: Path) -> Path:
    """A folder with what a run leaves."""
    begin(out)
    for name in ("parts", "models", "logs"):
        (out / name).mkdir()
        (out / name / "file").write_text("ours")
    (out / "results.json").write_text("{}")
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("name", runs.NAMES)
@pytest.mark.parametrize("flag", ["", "resume", "overwrite"])
def test_what_is_not_of_a_run_of_ours_is_not_touched(name: str, flag: str, tmp_path: Path) -> None:
    stranger = tmp_path / name
    if "." in name:
        stranger.write_text('{"model_type": "mixtral"}')
    else:
        stranger.mkdir()
        (stranger / "precious.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ExperimentError, match="choose another --out") as told:
        begin(tmp_path, **({flag: True} if flag else {}))
    assert name in str(told.value)
    assert contents(tmp_path) == before


def test_overwrite_deletes_what_the_manifest_names_and_nothing_else(tmp_path: Path) -> None:
    ours(tmp_path)
    for name in ("notes.txt", "data/photo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    begin(tmp_path, overwrite=True, dim=9)
    assert set(contents(tmp_path)) == {"notes.txt", "data/photo.png", "config.json"}
    assert storage.read_json(tmp_path / "config.json")["settings"]["dim"] == 9


def test_a_manifest_that_was_changed_is_none(tmp_path: Path) -> None:
    ours(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"models"', '"../models"'))
    before = contents(tmp_path)
    with pytest.raises(
        ExperimentError, match=r"cannot read .*config\.json: it is not as a run wrote it; without it nothing in"
    ):
        begin(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "model.pt").write_text("mine")
    (out / "work").symlink_to(tmp_path / "disk")
    begin(out, overwrite=True)
    assert not (out / "work").exists()
    assert (tmp_path / "disk" / "model.pt").exists()


def test_a_deletion_that_was_cut_short_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours(tmp_path)

    def full(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", full)
        with pytest.raises(OSError, match="Input/output error"):
            begin(tmp_path, overwrite=True)
    begin(tmp_path, overwrite=True)
    assert set(contents(tmp_path)) == {"config.json"}


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_two_processes_do_not_work_on_one_folder(tmp_path: Path) -> None:
    first = Options(tmp_path, resume=False, overwrite=False)
    with first.held:
        prepare(SETTINGS, first)
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ExperimentError, match=r"another process is at work on .*; wait for its end, or choose another"):
                begin(tmp_path, **flags)
    assert begin(tmp_path, resume=True) == []


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    child = os.fork() if hasattr(os, "fork") else None
    if child is None:
        pytest.skip("no processes to fork")
    if child == 0:  # dies with the lock in its hands
        held = storage.alone(tmp_path)
        held.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    with storage.alone(tmp_path):
        pass


def test_a_run_that_is_resumed_under_another_torch_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path)
    assert begin(tmp_path, resume=True) == []
    assert capsys.readouterr().err == ""
    before = runs.versions()
    monkeypatch.setattr(runs, "version", lambda name: "9.9" if name == "torch" else before[name])
    for _ in range(2):  # and it is not forgotten
        assert begin(tmp_path, resume=True) == [before]
        told = capsys.readouterr().err
        assert f"part of this run was made with torch {before['torch']}, now 9.9; its numbers may differ" in told
        assert "einops" not in told
    monkeypatch.undo()
    assert begin(tmp_path, resume=True) == [before | {"torch": "9.9"}]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExperimentError, match=f"cannot write {out}"):
            begin(out)
