"""The study of trainability: its runs, its tests against the controls, its page."""

import math
import re

import pytest

from studies import saved
from studies.reproduction import protocol
from studies.trainability import figures, page, results
from studies.trainability.__main__ import PROTOCOL, main

ARMS = ("linear", "linear+balance", "linear+balance, gate rate / 10", "linear+balance, residual", "prototypes+balance")
ARMS += (
    "prototypes+balance, gate rate / 10",
    "spectral",
    "spectral, relative",
    "spectral, norm term alone",
    "spectral, projected",
)


def made_up(level, seeds=20):
    """`level(arm, condition, seed)` is an accuracy."""
    plan = protocol.read(PROTOCOL, ("failure",))
    of_stage = plan["failure"]
    runs = [
        {
            "arm": f"{arm}, {condition}", "seed": seed, "accuracy": level(arm, condition, seed), "top_path_share": 0.2,
            "spectral_norm": [1.0], "stable_rank": [2.0],
        }
        for condition in of_stage["conditions"] for arm in of_stage["arms"] for seed in range(seeds)
    ]  # fmt: skip
    return {"protocol": plan, "runs": runs, "versions": {"torch": "2"}}


def test_the_protocol_gives_every_arm_every_condition_and_seed():
    plan = protocol.read(PROTOCOL, ("failure",))
    assert tuple(plan["failure"]["arms"]) == ARMS
    runs = protocol.runs(plan, "failure", {})
    assert len(runs) == len({run.name for run in runs}) == len(ARMS) * 12 * 20
    assert {run.config.gate_lr_scale for run in runs if "gate rate / 10" in run.arm} == {0.1}
    assert {run.config.penalty for run in runs if "projected" in run.arm} == {"project"}
    assert {run.config.layers for run in runs} == {2, 4, 6, 8}
    for arm in ARMS:
        control = results.control(arm)
        assert control is None or control in ARMS
        assert control != arm
    assert set(figures.STYLES) <= set(ARMS)


def test_who_trains_and_who_is_better():
    def level(arm, condition, seed):
        wobble = math.sin(7 * seed)
        if arm == "spectral" and condition == "4 layers, rate 3e-3":
            return 60.0 + wobble  # all train, where of the control none does
        if condition == "4 layers, rate 3e-3":
            return 10.0
        return (45.0 if arm == "spectral, projected" else 50.0) + wobble + 0.3 * math.sin(11 * seed + len(arm))

    found = {(test.arm, test.condition): test for test in results.tests(results.Runs(made_up(level)))}
    at_edge = found["spectral", "4 layers, rate 3e-3"]
    assert at_edge.trained == (20, 0)
    assert (at_edge.trains, at_edge.better) == ("shown", "shown")
    other = found["spectral, projected", "2 layers, rate 1e-3"]
    assert (other.trains, other.better) == ("not shown", "refuted")
    assert all(test.trains == "not shown" for key, test in found.items() if key != ("spectral", "4 layers, rate 3e-3"))
    assert ("linear+balance", "2 layers, rate 1e-3") not in found


def test_the_page_says_it_from_the_results(tmp_path):
    plan = made_up(lambda arm, condition, seed: 60.0 if arm.startswith("spectral") else 10.0 + math.sin(seed), seeds=16)
    del plan["runs"][-1]  # a seed that is not whole is left out
    files = page.write(plan, tmp_path)
    assert {file.name for file in files} == {"trainability.md", "trainability_tables.md", "trainability.png"}
    text = (tmp_path / "trainability.md").read_text()
    assert "15 of the protocol's 20 seeds" in text
    assert re.search(
        r"\*\*spectral\*\*, against prototypes\+balance\. Trains more often: 2 layers, rate 1e-3 \(15 against 0 of 15\)", text
    )
    assert "60.0 ± 0.0, worst 60.0<br>15 of 15 trained" in (tmp_path / "trainability_tables.md").read_text()


@pytest.mark.slow
def test_a_tiny_study_runs_and_goes_on(tmp_path, capsys):
    tiny = tmp_path / "study.toml"
    text = PROTOCOL.read_text()
    text = text.replace("epochs = 8", "epochs = 1").replace("samples_per_class = 475", "samples_per_class = 20")
    text = (
        text.replace("seeds = [0, 20]", "seeds = [0, 1]")
        .replace("novel = 5", "novel = 1")
        .replace("hidden = 128", "hidden = 8")
    )
    text = re.sub(r'^"[468] layers.*\n', "", text, flags=re.MULTILINE)
    tiny.write_text(text)
    command = ["run", "--protocol", str(tiny), "--out", str(tmp_path / "out")]
    assert main([*command, "--only", "spectral"]) == 0
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "parts").iterdir()}
    assert len(done) == 4 * 3
    assert main(command) == 0
    assert all((tmp_path / "out" / "parts" / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    found = saved.read(tmp_path / "out" / "results.json")
    assert len(found["runs"]) == 10 * 3
    assert results.Runs(found).seeds == [0]
    (tmp_path / "bad.toml").write_text("[settings]\n")
    assert main(["run", "--protocol", str(tmp_path / "bad.toml"), "--out", str(tmp_path / "other")]) == 1
    assert "bad.toml: it must be of the form of study.toml (KeyError: 'data')" in " ".join(capsys.readouterr().err.split())
