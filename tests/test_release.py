"""A release: what wheel and sdist hold, the order of imports, and the workflows that build and publish it."""

import ast
import email
import os
import re
import shlex
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import spectral_router
from hatch_build import absolute

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/us/spectral-router"
VERSION = spectral_router.__version__
NAME = f"spectral_router-{VERSION}"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOLDERS = ("benchmarks", "docs", "examples", "spectral_router", "studies", "tests", ".ci", ".github")
PAGES = (
    "CITATION.cff",
    "LICENSE",
    "hatch_build.py",
    "mkdocs.yml",
    "pyproject.toml",
    *(path.name for path in ROOT.glob("*.md")),
)


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Release(NamedTuple):
    wheel: Path
    sdist: Path

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            return email.message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The sdist of this checkout, and the wheel that is built from it alone, as the release workflow builds them."""
    folder = tmp_path_factory.mktemp("dist")
    addresses = {"REPO_URL": REPOSITORY, "SITE_URL": "https://docs.example.org/"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder, **addresses)
    built = Release(folder / f"{NAME}-py3-none-any.whl", folder / f"{NAME}.tar.gz")
    assert set(folder.iterdir()) == set(built), "one version, that of the package, for any Python and any system"
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_only(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        files = set(archive.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "spectral_router").glob("**/*.py")}
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert files == sources | {"spectral_router/py.typed"} | about
    assert release.wheel.stat().st_size < 300_000


@pytest.mark.slow
def test_wheel_works_in_a_new_environment(release: Release, tmp_path: Path) -> None:
    venv.create(tmp_path / "new")
    python = tmp_path / "new" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", release.wheel, cwd=tmp_path)
    # torch and einops are those of this interpreter; its .pth files, an editable install among them, are not read, nor
    # is PYTHONPATH
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (own / "borrowed.pth").write_text("\n".join([*site.getsitepackages(), site.getusersitepackages()]), encoding="utf-8")
    code = """
import importlib.metadata, spectral_router, torch
output = spectral_router.PrototypeRouter(4, 2)(torch.ones(1, 4))
print(spectral_router.__file__, importlib.metadata.version("spectral-router"), tuple(output.probs.shape), sep="\\n")
"""
    file, version, shape = run(python, "-E", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(own)
    assert (version, shape) == (VERSION, "(1, 2)")


@pytest.mark.slow
def test_sdist_holds_the_checkout(release: Release) -> None:
    """So the tests can be run from it, and the docs be built."""
    with tarfile.open(release.sdist) as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers()}
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in paths if path.suffix != ".pyc"} | set(PAGES)
    assert files == expected | {"PKG-INFO", ".gitignore"}


@pytest.mark.slow
def test_metadata(release: Release) -> None:
    run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *release, cwd=ROOT)
    metadata = release.metadata()
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split("[^a-z]", line)[0] for line in needed} == {"torch", "einops"}


@pytest.mark.slow
def test_links_work_on_the_page_of_the_index(release: Release) -> None:
    metadata = release.metadata()
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    assert "<!-- --8<--" not in page
    assert "pip install" in page
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert all(target.startswith("https://") for _, target in targets)
    ours = [(picture, target.removeprefix(f"{REPOSITORY}/")) for picture, target in targets if REPOSITORY in target]
    assert len(ours) > 5
    for picture, target in ours:
        kind, tag, path = target.split("/", 2)
        assert (kind, tag) == ("raw" if picture else "blob", f"v{VERSION}")
        assert (ROOT / path.partition("#")[0]).exists(), path
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert addresses["Repository"] == REPOSITORY
    assert addresses["Documentation"] == "https://docs.example.org"
    assert addresses["Changelog"].startswith(REPOSITORY)


def test_without_an_address_no_link_leads_nowhere() -> None:
    readme = absolute((ROOT / "README.md").read_text(encoding="utf-8"), "", "v1")
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", readme))
    text = "![a picture](docs/a.png) [a page](docs/a.md#b), [elsewhere](https://a.b/c), [mail](mailto:a@b.c)"
    assert absolute(text, "", "v1") == " a page, [elsewhere](https://a.b/c), [mail](mailto:a@b.c)"
    with_address = absolute(text, "https://a.b", "v1")
    assert with_address.startswith("![a picture](https://a.b/raw/v1/docs/a.png) [a page](https://a.b/blob/v1/docs/a.md#b), [e")


@pytest.mark.slow
def test_extras_say_what_they_are_for(release: Release) -> None:
    """What the wheel can use is few; the others need the checkout, and the file that names them says so."""
    comment = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("# The wheel holds the package alone.")[2]
    comment = comment.partition("[project.optional-dependencies]")[0].replace("\n#", "")
    wheel, checkout = (set(re.findall(r"\b(\w+)(?=,| and|\.)", part)) for part in comment.split("The others"))
    extras = set(release.metadata().get_all("Provides-Extra", []))
    assert extras & wheel == {"report", "gguf"}
    assert extras - wheel <= checkout


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)", workflow.read_text(encoding="utf-8"))
    assert used
    loose = [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+", line)]
    assert [line for line in loose if not line.startswith("./")] == []


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All, those of functions too, but for what only a type checker reads."""
    for statement in body:
        yield statement
        parts = [] if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test) else [statement]
        if not parts:
            assert isinstance(statement, ast.If)
            yield from statements(statement.orelse)
        for part in parts:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(part, field, []))


def imports(file: Path, name: str, modules: set[str]) -> set[str]:
    """The modules of the package that a module imports."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for statement in statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            above = package.split(".")[: 1 - statement.level or None] if statement.level else []
            base = ".".join([*above, *filter(None, [statement.module])])
            found |= {inner if (inner := f"{base}.{alias.name}") in modules else base for alias in statement.names}
    return found & modules


def graph(root: Path) -> dict[str, set[str]]:
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.glob("**/*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    return {name: imports(path, name, set(files)) for name, path in files.items()}


def test_imports_go_in_no_circle() -> None:
    modules = graph(ROOT / "spectral_router")
    assert {"spectral_router.wrap.handle", "spectral_router.penalties.formulas"} <= modules.keys()
    TopologicalSorter(modules).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("code", ["from . import b", "from .b import c", "import p.b", "def f():\n    from p.b import c"])
def test_a_circle_would_be_found(code: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    for name, text in {"__init__": "", "a": code, "b": "if True:\n    from .a import d"}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(package)).prepare()
    (package / "b.py").write_text("if TYPE_CHECKING:\n    from .a import d", encoding="utf-8")
    TopologicalSorter(graph(package)).prepare()


def commands(workflow: Path) -> Iterator[list[str]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    for step in (step for job in jobs for step in job.get("steps", [])):
        yield from (shlex.split(line) for line in step.get("run", "").splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_commands_of_the_workflows_exist(workflow: Path, release: Release) -> None:
    tools = {"ruff", "mypy", "mkdocs", "pip", "test"}
    extras = release.metadata().get_all("Provides-Extra", [])
    for command in commands(workflow):
        if command[:2] == ["python", "-m"]:
            assert find_spec(command[2]), command
        else:
            assert command[0] in tools, command
        for extra in re.findall(r"^\.\[(.+)\]$", "\n".join(command), flags=re.MULTILINE):
            assert extra in extras, command


@pytest.mark.slow
def test_workflow_tests_what_the_project_promises(release: Release) -> None:
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = ci["jobs"]["tests"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    assert [f"{prefix}{version}" for version in matrix["python"]] == [
        line for line in release.metadata().get_all("Classifier", []) if line.startswith(prefix)
    ]
    (needed,) = (line for line in release.metadata().get_all("Requires-Dist", []) if line.startswith("torch>"))
    assert matrix["torch"] == [f"{needed.replace('>=', '==')}.0", "torch"]
