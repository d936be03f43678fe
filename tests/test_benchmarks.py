"""The benchmarks run and write what they measured; their figures are nobody's to test."""

import json
from pathlib import Path

import pytest

from benchmarks import wrap

SMALL = ["--layers", "1", "--dim", "32", "--hidden", "32", "--experts", "4", "--tokens", "128", "--repeats", "3"]


def test_wrap_prints_a_table_and_writes_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrap.main([*SMALL, "--json", str(tmp_path / "wrap.json")])
    printed = capsys.readouterr().out
    assert "| total |" in printed
    assert "| tensors more alive after each step | 0 | +0 | |" in printed
    record = json.loads((tmp_path / "wrap.json").read_text())
    assert len(record["steps"]["wrapped"]) == len(record["steps"]["unwrapped"]) == 3
    assert record["memory"]["saved wrapped"] > record["memory"]["saved unwrapped"] > 0
    # the ratio is of pairs: with equal times it is one
    steps = {name: [wrap.Step(1.0, 2.0, 3.0)] * 3 for name in ("wrapped", "unwrapped")}
    assert wrap.ratio(steps, "total") == (1, 1, 1)
