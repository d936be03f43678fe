"""What every command does alike: help at once, Ctrl-C at any time, and a sentence for input that cannot be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.shared.command import ExperimentError, check_kinds, finish, telling
from examples.what_it_does.__main__ import main as what_it_does

REPO = Path(__file__).parents[2]
COMMANDS = {
    "examples.image_classification",
    "examples.transformer_moe",
    "examples.transformer_moe.finetune",
    "examples.what_it_does",
    "studies.cnn_experts",
    "studies.comparison",
    "studies.decoupled",
    "studies.learning_rates",
    "studies.regularizers",
    "studies.reproduction",
    "studies.surgery",
    "studies.trainability",
}
HEAVY = {"torch", "numpy", "transformers", "matplotlib", "PIL", "rich", "scipy", "accelerate", "spectral_router"}


def source(module: str) -> Path | None:
    path = REPO / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def at_once(file: Path) -> set[str]:
    """Modules that importing a file imports, those of our own with what they import in turn."""
    found: set[str] = set()
    waiting, seen = [file], set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        package = ".".join(file.relative_to(REPO).parts[:-1])
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:  # none that are inside an if or a function
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom):
                above = package.rsplit(".", statement.level - 1)[0] if statement.level else ""
                base = ".".join(filter(None, [above, statement.module]))
                names = [base, *(f"{base}.{alias.name}" for alias in statement.names)]
            found |= set(names)
            own = [place for name in names for place in (source(name), source(name.rpartition(".")[0])) if place]
            waiting += [place for place in own if place not in seen]
    return found


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_flags_and_help_need_nothing_that_takes_a_second_to_import(command: str) -> None:
    file = source(command)
    file = file if file is not None and file.name != "__init__.py" else REPO / command.replace(".", "/") / "__main__.py"
    tops = {name.split(".")[0] for name in at_once(file)}
    assert "argparse" in tops, "it is known what is imported"
    assert tops & HEAVY == set()


def test_a_heavy_import_would_be_found() -> None:
    assert {"torch", "rich"} <= {name.split(".")[0] for name in at_once(REPO / "examples/image_classification/experiment.py")}


PROGRAM = """
import builtins, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
wanted, command, real = sys.argv[1], sys.argv[2], builtins.__import__
sys.argv[1:] = sys.argv[3:]
def importing(name, *rest, **options):
    global wanted
    if name == wanted:
        wanted = None
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)
builtins.__import__ = importing
runpy.run_module(command, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("torch", "examples.image_classification"),
        ("torch._C", "examples.image_classification"),
        ("numpy", "examples.image_classification"),
        ("rich.console", "studies.comparison"),
        ("torch.nn", "studies.decoupled"),
        ("transformers", "examples.transformer_moe"),
        ("matplotlib", "examples.what_it_does"),
    ],
)
def test_stopped_while_it_still_imports(module: str, command: str, tmp_path: Path) -> None:
    run = [sys.executable, "-c", PROGRAM, module, command, "--out", str(tmp_path / "out.png")]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("stopped; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: too little memory: MemoryError; make the network"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: too little memory: [enf",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
            "error: too little memory: CUDA out of memory.",
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "error: too little memory: Storage size"),
        (ExperimentError("two\nlines"), "error: two lines\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    ],
)
def test_what_ends_a_run_is_said_in_one_line(error: Exception, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> str:
        raise error

    assert finish(work) == 1
    told = capsys.readouterr().err
    assert told.startswith(says)
    assert told.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden() -> None:
    def work() -> str:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        finish(work)
    with pytest.raises(ExperimentError, match=r"the file is none \(KeyError: 'a'\)"), telling("the file is none"):
        raise KeyError("a")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--steps -1", "--steps must be at least 1, got -1"),
        ("--out {here}", "--out must be a file named .png, or as one of"),
        ("--out {here}/folder.png", "--out must be a file, not a folder, got"),
        ("--out {here}/a.txt", "--out must be a file named .png, or as one of"),
        ("--out {here}/file/a.png", "--out must be in a folder that can be made, got"),
    ],
)
def test_the_picture_is_refused_before_the_work(
    flags: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.what_it_does import picture

    monkeypatch.setattr(picture, "train", None)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert what_it_does(flags.format(here=tmp_path).split()) == 1
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_settings_of_a_file_are_of_the_kind_of_their_flags() -> None:
    from examples.image_classification.config import Config

    check_kinds(Config, {"dim": 8, "lr": 1, "classes": None, "routers": ["a"], "temperature": "auto", "relative": True})
    for wrong in (
        {"dim": "8"},
        {"dim": 8.5},
        {"dim": True},
        {"dim": [8]},
        {"lr": "fast"},
        {"lr": None},
        {"relative": 1},
        {"classes": "ant"},
        {"classes": [3]},
        {"temperature": "warm"},
        {"data": 5},
        {"dims": 8},
    ):
        with pytest.raises(ExperimentError, match=r"--\w+(-\w+)* must be |dims is no setting"):
            check_kinds(Config, wrong)
