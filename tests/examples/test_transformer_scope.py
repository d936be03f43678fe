"""--adapt-scope of the language model example: what may change in the adaptation, and what the study makes of it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from pictures import without_pictures
from transformer_worker import write_domains

from examples.transformer_moe import study
from examples.transformer_moe.__main__ import main
from examples.transformer_moe.config import SCOPES, Config
from studies.surgery import report
from studies.surgery.__main__ import main as study_main

pytestmark = pytest.mark.slow
TINY = "--steps 6 --evaluations 1 --adapt-steps 4 --adapt-evaluations 2 --validation-windows 2 --layers 2"
TINY += " --dim 16 --hidden 16 --sequence 32 --seeds 1 --device cpu --report-to none"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "data"
    write_domains(folder)
    return folder


@pytest.fixture(scope="module")
def results(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    found = {}
    for scope in SCOPES:
        out = tmp_path_factory.mktemp(scope)
        flags = f"{TINY} --dataset {text} --arms both --adapt-scope {scope} --adapt-lr 0.01 --out {out}"
        with without_pictures():
            assert main(flags.split()) == 0
        found[scope] = json.loads((out / "results.json").read_text())["runs"]["both"][0]
    return found


def test_routers_stay_where_experts_alone_may_change(results: dict[str, dict]) -> None:
    for scope, run in results.items():
        norms = [row["spectral_norm"] for row in run["adapt"]["history"]]
        losses = [row["loss"] for row in run["adapt"]["history"]]
        assert (norms[0] == norms[-1]) == (scope != "all")
        assert losses[0] != losses[-1]
    assert results["all"]["train"]["history"] == results["path"]["train"]["history"]


def test_the_path_takes_the_share_and_is_kept(results: dict[str, dict]) -> None:
    assert "path" not in results["all"]["adapt"]
    assert all(experts == list(range(8)) for experts in results["experts"]["adapt"]["path"].values())
    assert all(0 < len(experts) < 8 for experts in results["path"]["adapt"]["path"].values())
    assert results["path"]["adapt"]["path"].keys() == set(results["path"]["adapt"]["gates"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"adapt_scope": "some"}, "--adapt-scope must be one of all, experts, path, got some"),
        ({"adapt_share": 0.0}, "--adapt-share must be above 0 and at most 1, got 0.0"),
        ({"adapt_scope": "path", "fsdp": True}, "--adapt-scope must be all under --fsdp, got path"),
    ],
)
def test_messages(flags: dict, message: str) -> None:
    with pytest.raises(study.data.ExperimentError, match=message):
        Config(**flags).validate()


def phase(gains: list[float], rises: list[float], path: dict | None = None) -> dict:
    history = [{"domains": {"a": 2.0 - g, "b": 3.0 + r}, "load": [[0.25] * 4] * 2} for g, r in zip(gains, rises, strict=True)]
    return {"history": history} | ({} if path is None else {"path": path})


def test_forgetting_at_equal_gain_by_hand() -> None:
    parts = []
    for seed in range(2):
        phases = {
            "all": phase([0.0, 0.2, 0.4], [0.0, 0.1 + seed / 10, 0.5]),
            "experts": phase([0.0, 0.1, 0.3], [0.0, 0.05, 0.1], {"g": [0, 1, 2, 3], "h": [0, 1, 2, 3]}),
            "path": phase([0.0, 0.1, 0.2], [0.0, 0.02, 0.04], {"g": [1], "h": [0]}),
        }
        parts += [{"arm": "none", "seed": seed, "domain": "a", "scope": scope, **p} for scope, p in phases.items()]
    found = report.of(parts)["summary"]["none"]
    for domain in ("a", report.EVERY):
        of = found[domain]
        assert of["all"]["forgetting_at_equal_gain"]["mean"] == pytest.approx(0.15)
        assert of["experts"]["forgetting_at_equal_gain"]["mean"] == pytest.approx(0.075)
        assert of["path"]["forgetting_at_equal_gain"]["mean"] == pytest.approx(0.04)
        assert of["path"]["difference"]["mean"] == pytest.approx(-0.11)
        assert of["path"]["free"]["mean"] == pytest.approx(0.25)
        assert of["path"]["gain"]["n"] == 2


def test_the_study_runs_and_goes_on(text: Path, tmp_path: Path) -> None:
    command = f"{TINY} --dataset {text} --arms none --out {tmp_path}".split()
    assert study_main(command) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(first["runs"]) == 6
    assert "mean of domains: others give up at equal gain" in (tmp_path / "tables.md").read_text()
    for file in tmp_path.glob("parts/*numbers*"):
        file.unlink()
    assert study_main([*command, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["summary"] == first["summary"]
