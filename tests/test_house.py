"""The order of the rooms: who may import whom, and that a file fits in the head."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spectral_router"
# what each room may import, besides itself and the ground floor
FLOORS: dict[str, set[str]] = {
    "penalties": set(),
    "balance": set(),
    "routing": {"penalties", "balance"},
    "gates": set(),
    "wrap": {"penalties", "balance", "routing", "gates"},
    "report": {"penalties", "balance", "routing", "gates", "wrap"},
    "surgery": {"penalties", "balance", "routing", "gates", "wrap"},
    "integrations": {"penalties", "balance", "routing", "gates", "wrap"},
}
GROUND = {"_precision", "_rules", "_sharding"}
# what each folder around the package may import, besides itself and the package's public names
# (studies time things with the benchmarks' harness, a benchmark times what only studies use)
AROUND: dict[str, set[str]] = {"examples": set(), "studies": {"examples", "benchmarks"}, "benchmarks": {"examples", "studies"}}
PUBLIC = {"", "functional", "integrations"}


def reached(path: Path, package: Path) -> list[tuple[int, str]]:
    """For each import of our own in a file: its line, and the path of the module below the package."""
    found = []
    place = path.relative_to(package).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, n.name.partition(".")[2]) for n in node.names if n.name.split(".")[0] == package.name]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*place[: len(place) - node.level], *filter(None, (node.module or "").split("."))]
            names = [""] if node.module else [alias.name for alias in node.names]
            found += [(node.lineno, ".".join([*base, *filter(None, [name])])) for name in names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
            found.append((node.lineno, (node.module or "").partition(".")[2]))
    return found


def offences(package: Path) -> list[str]:
    told = []
    for path in sorted(package.glob("**/*.py")):
        room, *inside = path.relative_to(package).parts
        for line, module in reached(path, package):
            target = module.split(".")[0]
            if inside:  # in a room
                fine = target in GROUND or target == room or target in FLOORS[room]
                # one imports from the file that defines a name, not from another room's door
                fine = fine and (target in GROUND or "." in module or room == "integrations")
            else:
                fine = room == "__init__.py" or target in GROUND or (room == "functional.py" and target in FLOORS)
            if not fine:
                told.append(f"{path.relative_to(package)}:{line} imports {module or package.name}")
    return told


def test_imports_run_down_only() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)
    assert offences(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("penalties/a.py", "from ..balance.formulas import x"),
        ("balance/a.py", "def f():\n    from ..penalties import groups"),
        ("gates/a.py", "from p.wrap.handle import wrap_moe"),
        ("gates/a.py", "import p.penalties.groups"),
        ("wrap/a.py", "from ..penalties import SpectralRankPenalty"),
        ("wrap/a.py", "from .. import functional"),
        ("_precision.py", "from .wrap.handle import wrap_moe"),
    ],
)
def test_an_import_upwards_would_be_found(place: str, code: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    for room in FLOORS:
        (package / room).mkdir(parents=True)
    (package / place).write_text(code, encoding="utf-8")
    assert len(offences(package)) == 1


def strays(folder: Path) -> list[str]:
    """Imports, in a folder around the package, of what it may not import."""
    told = []
    barred = {*AROUND, "tests"} - AROUND[folder.name] - {folder.name}
    for path in sorted(folder.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top, room = [*module.split("."), ""][:2]
                if (top == PACKAGE.name and room not in PUBLIC) or top in barred:
                    told.append(f"{path.relative_to(folder.parent)} imports {module}")
    return told


@pytest.mark.parametrize("folder", AROUND)
def test_what_lies_around_the_package_uses_its_public_names(folder: str) -> None:
    assert strays(ROOT / folder) == []


@pytest.mark.parametrize(
    "code", ["from studies.oneshot import stacked", "import tests", "from spectral_router.wrap.handle import MoEHandle"]
)
def test_a_stray_import_would_be_found(code: str, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.py").write_text(f"from spectral_router import route\n{code}", encoding="utf-8")
    assert len(strays(tmp_path / "examples")) == 1


@pytest.mark.parametrize("name", [*FLOORS, *sorted(GROUND), *AROUND, "functional"])
def test_the_page_on_the_architecture_knows_it(name: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page or f"`{name}/`" in page
    assert name in (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text
    assert len(text) > 100


def test_a_file_fits_in_the_head_or_says_why_not() -> None:
    long = [path for path in PACKAGE.glob("**/*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 250]
    silent = [path for path in long if "Over 250 lines: " not in (ast.get_docstring(ast.parse(path.read_text())) or "")]
    assert silent == []
