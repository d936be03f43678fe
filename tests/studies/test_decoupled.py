"""The study of the decoupled penalty, a tiny run of it: its cells, its choice, its resumption."""

import json
from pathlib import Path

import pytest

from examples.shared.command import ExperimentError
from examples.shared.storage import read_json, write_json
from studies.decoupled import study
from studies.decoupled.__main__ import main

pytestmark = pytest.mark.slow


def test_a_run_is_resumed_and_its_table_marks_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "COEFFICIENTS", (0.1, 10.0))
    flags = ["--out", str(tmp_path / "run"), "--seeds", "2", "--steps", "2"]
    assert main(flags) == 0
    file = tmp_path / "run" / "results.json"
    results = read_json(file)
    assert len(results["cells"]) == 2 * (1 + 2 * 2)
    values = list(results["cells"].values())
    assert len({value["task"] for value in values}) > 5
    # one cell is lost; the others are kept to the digit
    lost = study.Cell(1, "decoupled", 10.0).name
    kept = results["cells"].pop(lost)
    write_json(file, results)
    assert main([*flags, "--resume"]) == 0
    again = json.loads(file.read_text())["cells"]
    assert again[lost] == pytest.approx(kept)
    table = (tmp_path / "run" / "tables.md").read_text()
    assert table.count("| **in the gradient** |") <= 1
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 1 + 4


def test_the_choice_is_within_the_slack() -> None:
    def cell(task: float, rank: float) -> dict[str, float]:
        return {"task": task, "stable_rank": rank, "lowest_rank": rank, "sigma_drift": 0.0}

    cells = {study.Cell(0, "none", 0.0).name: cell(1.0, 3.0)}
    for way in study.WAYS:
        for rank, coefficient in enumerate(study.COEFFICIENTS):
            cells[study.Cell(0, way, coefficient).name] = cell(1.0 if coefficient <= 1 else 1.5, 4.0 + rank)
    lines = study.table({"cells": cells}, 1).splitlines()
    assert [line for line in lines if "**" in line and line.startswith("|")] == [
        line for line in lines if line.startswith("| **") and "| **1** |" in line
    ]


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"settings": {"seeds": 1, "steps": 2}, "cells": {}})
    with pytest.raises(ExperimentError, match="already holds a run; pass --resume"):
        study.run(tmp_path, 1, 2, resume=False)
    with pytest.raises(ExperimentError, match="needs the settings that the run"):
        study.run(tmp_path, 2, 2, resume=True)
