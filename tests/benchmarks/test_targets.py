"""`python -m benchmarks.targets` on files that are not the benchmarks'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import targets

FOREIGN = [
    "",
    "{",
    "[]",
    "7",
    "null",
    "{}",
    '{"reports": 3}',
    '{"reports": []}',
    '{"reports": [{"title": "wrap_moe"}]}',
    "[" * 100_000,
]
ZERO = {"reports": [{"title": "wrap_moe", "raw": {"step": {"wrapped": [1.0], "unwrapped": [0.0]}}}]}


@pytest.mark.parametrize("text", [*FOREIGN, json.dumps(ZERO), None], ids=lambda text: str(text)[:30])
def test_a_foreign_file_is_named(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        targets.main([str(file)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"error: files must be what `python -m benchmarks --json` wrote of all benchmarks, got {file} (" in told
