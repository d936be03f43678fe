"""The benchmarks run and write what they measured; their figures are nobody's to test."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import _harness, launches, oneshot, pages, targets, wrap

pytestmark = pytest.mark.slow


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are not looked at, so that a first call is as good as a third."""
    monkeypatch.setattr(_harness, "WARM_UP", 0)


@pytest.mark.usefixtures("no_warm_up")
def test_every_benchmark_runs_and_every_target_finds_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, tables = tmp_path / "figures.json", tmp_path / "figures.md"
    benchmarks.main(["--quick", "--json", str(figures), "--markdown", str(tables)])
    printed = capsys.readouterr().out
    record = json.loads(figures.read_text())
    assert record["machine"]["torch"] == torch.__version__
    for report in record["reports"]:
        assert report["rows"]
        assert all(len(row) == len(report["columns"]) for row in report["rows"])
        assert f"### {report['title']}" in printed
        assert f"### {report['title']}" in tables.read_text()
    for target in targets.TARGETS:
        assert targets.rows(target, record), target
    assert set(record["seconds"]) == set(benchmarks.BENCHMARKS)
    targets.main([str(figures), str(figures)])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(targets.TARGETS)
    the_pages_are_made_of_it(figures, tmp_path, record)


def the_pages_are_made_of_it(figures: Path, docs: Path, record: dict[str, Any]) -> None:
    saved = docs / "growth.json"
    pages.main([str(figures), str(figures), "--docs", str(docs), "--saved", str(saved)])
    shown = [(docs / f"{name}.md").read_text() for name in ("benchmark_tables", "delivery_table", "benchmark_targets")]
    for report in record["reports"]:  # each on one of both
        assert sum(f"{report['title']}" in page for page in shown[:2]) == 1
    assert all(target.ratio in shown[2] for target in targets.TARGETS)
    picture = docs / "images" / "benchmark_growth.png"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    pages.main(["--docs", str(docs), "--saved", str(saved)])  # the picture alone, of what was kept
    assert picture.exists()


@pytest.mark.usefixtures("no_warm_up")
def test_the_oneshot_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    oneshot.main(["--quick"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * len(oneshot.SCOPES) + 1


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["penalty", "speed"])
    assert "names must be among penalty, growth, tracking" in capsys.readouterr().err


def test_contenders_take_turns_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []
    seconds = _harness.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)
    assert "".join(order[3 * _harness.WARM_UP :]) in ("abcbcacab", "bcacababc", "cababcbca")
    # a machine that is ten times slower in one round changes no ratio
    assert _harness.ratio({"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == (2, 2, 2)
    assert _harness.ratio({"a": [3.0], "b": [1.0]}, "a", "b") == (3, 3, 3)


def test_slow_contenders_have_fewer_rounds_but_never_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "PATIENCE", 0.0)
    assert len(_harness.interleave({"a": lambda: None}, 20)["a"]) == _harness.FEWEST
    assert len(_harness.interleave({"a": lambda: None}, 2)["a"]) == 2
    monkeypatch.setattr(_harness, "PATIENCE", 60.0)
    assert len(_harness.interleave({"a": lambda: None}, 20)["a"]) == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts operators of a CPU")
def test_operators_of_a_call_are_counted() -> None:
    a = torch.ones(3)
    assert launches.count(lambda: a.add(a).mul(a)) == (2, None)


def test_clock_and_peak_measure_what_they_say() -> None:
    clock = _harness.Clock()
    time.sleep(0.02)
    clock.mark()
    clock.mark()
    slept, nothing = clock.seconds()
    assert slept >= 0.02 > nothing

    def call() -> None:
        first = torch.empty(1 << 20)  # 4 MiB
        second = first + 1  # 8 MiB at once
        del first
        second.add_(1)

    assert _harness.peak_bytes(call) == pytest.approx(8 << 20, rel=0.01)


def test_a_target_is_judged_by_the_median_of_the_runs() -> None:
    def run(seconds: float) -> dict[str, object]:
        raw = {"step": {"wrapped": [seconds], "unwrapped": [1.0]}}
        return {"reports": [{"title": "wrap_moe on a model", "raw": raw}]}

    kept = [target for target in targets.TARGETS if target.report == "wrap_moe" and target.row == "step"]
    assert len(kept) == 1
    assert [targets.rows(kept[0], run(2.0))["step"], kept[0].holds(1.03), kept[0].holds(1.04)] == [2, True, False]


def test_the_docs_show_the_targets_and_tables_of_today() -> None:
    docs = Path(__file__).parents[2] / "docs"
    shown, tables = ((docs / name).read_text(encoding="utf-8") for name in ("benchmark_targets.md", "benchmark_tables.md"))
    for target in targets.TARGETS:
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        lines = [line for line in shown.splitlines() if line.startswith(f"| {target.report}") and target.row in line]
        assert any(f"| {target.ratio} | {bound} |" in line for line in lines), target
    for name in (
        "Penalty over",
        "Penalty against",
        "Following",
        "PrototypeRouter",
        "Training step",
        "wrap_moe",
        "Import",
        "ESTIMATE",
    ):
        assert f"### {name}" in tables


def test_wrap_leaves_no_tensor_alive(tmp_path: Path) -> None:
    small = ["--layers", "1", "--dim", "32", "--hidden", "32", "--tokens", "128", "--repeats", "3"]
    wrap.main([*small, "--json", str(tmp_path / "wrap.json")])
    raw = json.loads((tmp_path / "wrap.json").read_text())["reports"][0]["raw"]
    assert raw["tensors left"] == {"unwrapped": [0], "wrapped": [0]}
    assert len(raw["step"]["wrapped"]) == len(raw["step"]["unwrapped"]) == 3
    assert raw["saved for backward"]["wrapped"][0] > raw["saved for backward"]["unwrapped"][0] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["--device", "cuda"])
    assert "--device cuda needs a GPU that torch sees, got none" in capsys.readouterr().err
