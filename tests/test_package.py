"""What is shipped: imports, public names, the wheel, and the code in the documentation."""

import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spectral_router

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def python(code: str, cwd: Path, **environment: str) -> str:
    """The output of a fresh interpreter that finds no package through the folder it starts in."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_torch_and_einops_and_nothing_else(tmp_path: Path) -> None:
    show = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    base, ours = (
        set(python(f"import torch; import einops; {extra}; {show}", tmp_path, PYTHONPATH=str(ROOT)).split())
        for extra in ("pass", "import spectral_router")
    )
    assert ours - base == {"spectral_router"}


def test_public_names_are_those_of_all() -> None:
    names = spectral_router.__all__
    assert names == sorted(names)
    modules = {path.stem for path in (ROOT / "spectral_router").glob("*.py")} | {"integrations"}
    public = {name for name in vars(spectral_router) if not name.startswith("_")}
    # a submodule is an attribute as soon as it is imported; the names in it are what is public
    assert public - (modules - set(names)) == set(names)


@pytest.mark.parametrize("module", [spectral_router, spectral_router.functional])
def test_every_public_name_has_a_docstring(module) -> None:
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__, name
        # a NamedTuple or dataclass writes its own when there is none
        assert not value.__doc__.startswith(f"{name}("), name
        members = vars(value).items() if inspect.isclass(value) else ()
        for member, inner in members:
            if inspect.isfunction(inner) and not member.startswith("_") and member not in ("forward", "extra_repr"):
                assert inner.__doc__, f"{name}.{member}"


def test_version_is_that_of_the_project_file() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert spectral_router.__version__ == version


def test_wheel_holds_the_package_only_and_works_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        archive.extractall(unpacked)
    info = f"spectral_router-{spectral_router.__version__}.dist-info"
    assert {file.partition("/")[0] for file in files} == {"spectral_router", info}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "spectral_router").glob("**/*.py")}
    assert {file for file in files if file.startswith("spectral_router/")} == sources | {"spectral_router/py.typed"}
    assert any(file.startswith(info) and file.endswith("LICENSE") for file in files)
    code = (
        "import spectral_router, torch; print(spectral_router.__file__); spectral_router.PrototypeRouter(4, 2)(torch.ones(4))"
    )
    assert Path(python(code, tmp_path, PYTHONPATH=str(unpacked)).strip()).is_relative_to(unpacked)


def python_blocks(text: str) -> list[str]:
    """The ```python blocks, each preceded by empty lines so that a traceback shows the line of the document."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in blocks]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_in_the_documentation_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = python_blocks(text)
    assert len(blocks) == text.count("```python"), "a block that is indented, or never closed, would not be run"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(document), "exec", dont_inherit=True), namespace)
