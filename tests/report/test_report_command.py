"""The command line: tables, JSON, the page, and one sentence with exit code 2 for whatever is wrong."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from report_checkpoints import gates_of, save_sharded, weights
from safetensors.torch import save_file

from spectral_router import inspect_checkpoint
from spectral_router.report import command
from spectral_router.report.command import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_file(weights(), tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def moved(tmp_path: Path, step: int) -> Path:
    """A checkpoint of the same model, later."""
    folder = tmp_path / f"step-{step}"
    folder.mkdir()
    tensors = weights()
    for name in gates_of(tensors):
        tensors[f"{name}.weight"] *= 1 + 0.1 * step
    tensors["layers.2.mlp.gate.weight"][3] *= 0.01
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_inspect_prints_a_table(model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line.split() for line in out.splitlines() if "healthy" in line]
    report = inspect_checkpoint(model)
    assert [(row[0], float(row[1]), float(row[2])) for row in rows] == [
        (
            str(gate.layer),
            pytest.approx(gate.geometry.spectral_norm, rel=5e-3),
            pytest.approx(gate.geometry.stable_rank, rel=5e-3),
        )
        for gate in report.gates
    ]
    assert "fresh" in out
    assert "3 of 8 experts x 32" in out


def test_a_narrow_terminal_keeps_the_verdict(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert out.count("healthy") == 3
    assert "condition" not in out
    assert max(map(len, out.splitlines())) <= 44


def test_compare_and_a_run_print_theirs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    later = [str(moved(tmp_path, step)) for step in (1, 2)]
    assert main(["compare", str(model), later[1]]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ 0 +20 % +1 ", out, flags=re.MULTILINE)
    assert "2: prune 3 (rows below 0.1 of the median length)" in out
    assert main(["inspect", str(model), *later]) == 0
    out = capsys.readouterr().out
    assert "3 checkpoints, medians over gates" in out
    assert "1 of 3" in out
    assert "dead-looking 3" in out


def test_json_is_what_the_library_gives(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(model), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(inspect_checkpoint(str(model)).to_dict()))
    later = moved(tmp_path, 1)
    target = tmp_path / "out.json"
    assert main(["inspect", str(model), str(later), "--json", str(target)]) == 0
    assert capsys.readouterr().err == f"wrote {target}\n"
    told = json.loads(target.read_text())
    assert [len(told[key]) for key in ("checkpoints", "drift")] == [2, 2]
    assert told["drift"][1]["gates"][0]["change"] == pytest.approx(0.1, rel=1e-4)
    assert main(["compare", str(model), str(later), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"][0]["change"] == pytest.approx(0.1, rel=1e-4)


def test_json_without_rich(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')")
    code = "import sys; from spectral_router.report.command import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = [sys.executable, "-c", code, "inspect", str(model)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'the table needs rich; pip install "spectral-router[report]", or write --json - for the numbers alone' in done.stderr
    done = subprocess.run([*run, "--json", "-"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["gates"]) == 3


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("arguments", [["inspect", "A"], ["inspect", "A", "B", "C"], ["compare", "A", "B"]], ids=" ".join)
def test_the_page_is_whole_and_loads_nothing(arguments: list[str], model: Path, tmp_path: Path) -> None:
    places = {"A": str(model), "B": str(moved(tmp_path, 1)), "C": str(moved(tmp_path, 2))}
    target = tmp_path / "report.html"
    assert main([places.get(word, word) for word in arguments] + ["--html", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert len(found.links) == 3  # a heat map a layer
    assert "script" not in found.tags
    assert found.tags["svg"] >= 7
    assert not re.search(r"url\(|@import|https?:(?!//www.w3.org)", text)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert "nan" not in re.findall(r'points="([^"]*)"', text)


def test_names_cannot_put_code_into_the_page(tmp_path: Path) -> None:
    tensors = {f"<script>alert(1)</script>.{name}": tensor for name, tensor in weights().items()}
    torch.save(tensors, tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt"), "--html", str(tmp_path / "r.html")]) == 0
    assert "<script" not in (tmp_path / "r.html").read_text()


def test_broken_and_lonely_gates_have_pages_too(tmp_path: Path) -> None:
    tensors = weights(layers=1)
    tensors["layers.0.mlp.gate.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]) == 0
    assert "broken" in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["gates"][0]["verdicts"][0]["word"] == "broken"


def wrong(folder: Path, name: str) -> tuple[list[str], str]:
    """What is wrong, by name: the arguments, and what the sentence has to say."""
    tensors = weights()
    good = folder / "good"
    good.mkdir()
    save_file(tensors, good / "model.safetensors")
    sharded = save_sharded(tensors, folder / "sharded")
    shard = sharded / "model-00002-of-00002.safetensors"
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("no checkpoint")
    if name == "no file":
        return ["inspect", str(folder / "nowhere")], r"there is no file or folder .*nowhere"
    if name == "empty folder":
        return ["inspect", str(folder / "empty")], r"holds no checkpoint: no \.safetensors, \.bin"
    if name == "not a checkpoint":
        return ["inspect", str(folder / "text.txt")], r"text.txt is no checkpoint: known are .safetensors"
    if name == "several":
        for number in (1, 2):
            save_file(tensors, folder / "empty" / f"{number}.safetensors")
        return ["inspect", str(folder / "empty")], r"holds 2 checkpoints \(1.safetensors, 2.safetensors, \.\.\.\); name one"
    if name == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
        return ["inspect", str(sharded)], r"00002.safetensors is truncated or damaged: .* the file has \d+; download or save it"
    if name == "missing shard":
        shard.unlink()
        return [
            "inspect",
            str(sharded),
        ], r"index.json names model-00002-of-00002.safetensors, which is missing; 2 shards belong"
    if name == "missing shard without index":
        shard.unlink()
        (sharded / "model.safetensors.index.json").unlink()
        return ["inspect", str(sharded)], r"holds 1 of 2 shards, and no index; add the missing ones"
    if name == "index of elsewhere":
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../good/model.safetensors"}}))
        return ["inspect", str(sharded)], r"names '../good/model.safetensors', which is not beside it"
    if name == "index without map":
        (sharded / "model.safetensors.index.json").write_text("[1]")
        return ["inspect", str(sharded)], r"index.json is no table, but a list"
    if name == "no gate":
        dense = {f"layers.{i}.mlp.{part}.weight": torch.ones(48, 32) for i in range(2) for part in ("up_proj", "gate_proj")}
        save_file({**dense, "layers.0.router.weight": torch.ones(3, 32)}, folder / "dense.safetensors")
        message = r"has no router gate among its 5 tensors \(near misses, .*: layers.0.router.weight \(3, 32\)\)"
        return ["inspect", str(folder / "dense.safetensors")], message
    if name == "bad config":
        (good / "config.json").write_text("{")
        return ["inspect", str(good)], r"config.json is no JSON \(Expecting property name"
    if name == "different models":
        other = folder / "other.safetensors"
        save_file(weights(layers=2), other)
        return ["compare", str(good), str(other)], r"are different models: 3 gates and 2"
    if name == "target in no folder":
        return ["inspect", str(good), "--html", str(folder / "no" / "r.html")], r"cannot be written, there is no folder"
    if name == "target is a folder":
        return ["inspect", str(good), "--json", str(folder / "empty")], r"cannot be written, it is a folder; name a file"
    if name == "no data":
        return [
            "inspect",
            str(good),
            "--data",
            str(folder / "ids.pt"),
        ], r"--data runs the model, and .* has no config.json that names"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no file",
        "empty folder",
        "not a checkpoint",
        "several",
        "truncated shard",
        "missing shard",
        "missing shard without index",
        "index of elsewhere",
        "index without map",
        "no gate",
        "bad config",
        "different models",
        "target in no folder",
        "target is a folder",
        "no data",
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments, message = wrong(tmp_path, name)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert re.match(rf"spectral-router: .*{message}", err)
    assert err.count("\n") == 1
    assert out == ""


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 2
    assert 'reading GGUF needs the gguf package; pip install "spectral-router[gguf]"' in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "report.html"
    target.write_text("the last report")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert main(["inspect", str(model), "--html", str(target)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert target.read_text() == "the last report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.html"]


def test_the_bar_goes_to_a_terminal_alone(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(model)]) == 0
    assert capsys.readouterr().err == ""
    seen = []
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True)
    real = command.inspect_checkpoint
    monkeypatch.setattr(
        command,
        "inspect_checkpoint",
        lambda path, progress: real(path, progress=lambda done, total: (seen.append((done, total)), progress(done, total))),
    )
    assert main(["inspect", str(model)]) == 0
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_data_runs_the_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from moe_models import mixtral

    from spectral_router import wrap_moe

    model = mixtral()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 12))
    torch.save({"input_ids": ids}, tmp_path / "ids.pt")
    assert main(["inspect", str(tmp_path), "--data", str(tmp_path / "ids.pt"), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]
    with wrap_moe(model) as handle:
        expected = handle.report({"input_ids": ids})
    assert told.keys() == expected.keys()
    for name, gate in told.items():
        assert gate["load"] == expected[name]["load"]
        assert gate["radius"]["50%"] == pytest.approx(expected[name]["radius"]["50%"], rel=1e-5)
    assert main(["inspect", str(tmp_path), "--data", str(tmp_path / "none.pt")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["inspect", "A"], ["inspect", "A", "B"], ["compare", "A", "B"]], ids=" ".join)
def test_the_charts_alone_are_one_picture(arguments: list[str], model: Path, tmp_path: Path) -> None:
    places = {"A": str(model), "B": str(moved(tmp_path, 1))}
    target = tmp_path / "charts.svg"
    assert main([places.get(word, word) for word in arguments] + ["--svg", str(target)]) == 0
    root = ElementTree.parse(target).getroot()
    assert len(root.findall("{*}svg")) == len(root.findall("{*}text")) >= 6
    assert all(part.findall("{*}polyline") or part.findall("{*}circle") for part in root.findall("{*}svg"))
    assert "var(" not in target.read_text()
    keys = [len(key.findall("{*}circle")) for key in root.findall("{*}g")]  # which curve is which gate
    assert keys == ([3] if arguments == ["inspect", "A", "B"] else [])
