"""What is shipped: imports and public names."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectral_router

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, **environment: str) -> str:
    """The output of a fresh interpreter that finds no package through the folder it starts in."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_loads_torch_and_einops_and_nothing_else(tmp_path: Path) -> None:
    show = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    base, ours = (
        set(python(f"import torch; import einops; {extra}; {show}", tmp_path, PYTHONPATH=str(ROOT)).split())
        for extra in ("pass", "import spectral_router")
    )
    assert ours - base == {"spectral_router"}


@pytest.mark.slow
def test_rooms_that_training_has_no_use_for_open_when_asked_for(tmp_path: Path) -> None:
    show = "print(*sorted({name.split('.')[1] for name in sys.modules if name.startswith('spectral_router.')}))"
    code = f"import sys; import spectral_router as s; {show}; s.surgical; {show}; s.inspect_checkpoint; {show}"
    first, second, third = (set(line.split()) for line in python(code, tmp_path, PYTHONPATH=str(ROOT)).splitlines())
    assert not first & {"surgery", "report", "integrations"}
    assert second - first == {"surgery"}
    assert third - second == {"report"}


def test_public_names_are_those_of_all() -> None:
    names = spectral_router.__all__
    assert names == sorted(names)
    assert all(hasattr(spectral_router, name) for name in names)
    modules = {path.stem for path in (ROOT / "spectral_router").iterdir()}
    imported = {"TYPE_CHECKING", "Any", "import_module"}
    public = {name for name in dir(spectral_router) if not name.startswith("_")} - imported
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
