"""The documentation: its code runs, its pictures and sections are used, its numbers say where they come from."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import spectral_router
from examples.what_it_does import picture
from examples.what_it_does.__main__ import main as draw_picture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
# what holds measured numbers; each is a page, or a part of one, with the command that made it
RESULTS = ("experiment", "comparison", "language_model", "regularizers", "cnn_experts", "benchmarks", "reproduction")
RESULTS += ("delivery", "gates", "report", "surgery", "wrap")

pytestmark = [
    # Lightning's own: under torch 2.15, and of a loader that is good enough for an example
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The .\w+_dataloader. does not have many workers"),
]


def python_blocks(text: str) -> list[str]:
    """The ```python blocks, each preceded by empty lines so that a traceback shows the line of the document."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in blocks]


def without_blocks() -> set[str]:
    return {name for name, text in TEXTS.items() if "```python" not in text}


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - without_blocks()))
def test_code_in_the_documentation_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS[name]
    blocks = python_blocks(text)
    assert len(blocks) == text.count("```python"), "a block that is indented, or never closed, would not be run"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(ROOT / name), "exec", dont_inherit=True), namespace)


def test_readme_is_short_and_has_the_two_commands() -> None:
    readme = TEXTS["README.md"]
    assert readme.count("\n") < 130
    assert 'pip install -e ".[examples]" && OMP_NUM_THREADS=1 python -m examples.image_classification' in readme
    assert 'pip install -e ".[test]" && python -m pytest' in readme


def test_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS["README.md"])
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_picture_is_shown() -> None:
    # sections that a page takes in stand beside it, and are searched too
    shown = "\n".join(TEXTS.values())
    assert [path.name for path in DOCS.glob("images/*") if f"images/{path.name}" not in shown] == []


def test_every_page_is_in_the_navigation_or_a_part_of_one() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md")}
    parts = {part for text in TEXTS.values() for part in re.findall(r'^ *--8<-- "docs/([\w/]+\.md)', text, flags=re.MULTILINE)}
    assert {page for page in pages - parts if f": {page}\n" not in navigation} == set()


@pytest.mark.parametrize("name", [*sorted(TEXTS), "CHANGELOG.md", "CONTRIBUTING.md"])
def test_commands_and_files_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    modules = set(re.findall(r"-m ((?:examples|studies|benchmarks|survey)[\w.]*\w)", text))
    assert {module for module in modules if find_spec(module) is None} == set()
    files = set(re.findall(r"`((?:docs|examples|spectral_router|studies|benchmarks|tests)/[\w./]+)`", text))
    assert {file for file in files if not (ROOT / file).exists()} == set()


@pytest.mark.parametrize("page", RESULTS)
def test_results_name_the_command_that_makes_them(page: str) -> None:
    assert re.search(r"python -m (examples|studies|benchmarks)", TEXTS[f"docs/{page}.md"])


def test_every_public_name_is_in_the_api() -> None:
    api = "\n".join(text for name, text in TEXTS.items() if name.startswith("docs/api/"))
    described = set(re.findall(r"^::: spectral_router\.([\w.]+)$", api, flags=re.MULTILINE))
    functions = {f"functional.{name}" for name in spectral_router.functional.__all__}
    assert (set(spectral_router.__all__) - {"functional"}) | functions <= described
    listed = set(re.findall(r"\]\[spectral_router\.(\w+)\]", TEXTS["docs/api/index.md"]))
    assert set(spectral_router.__all__) - {"functional"} == listed


def test_the_picture_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "what_it_does.png"
    assert draw_picture(["--out", str(out), "--seeds", "1", "--steps", "2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("stable rank") == len(picture.ARMS)
    curves = [picture.train(0, 30, options) for options, _ in picture.ARMS.values()]
    assert len({curve.rank[0].item() for curve in curves}) == 1, "the versions of a seed start equal"
    assert curves[0].rank[-1] < curves[1].rank[-1], "the penalty raises the stable rank"
