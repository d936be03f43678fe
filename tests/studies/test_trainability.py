"""The study of trainability: its runs, its tests against the controls, its page."""

import math
import re
from pathlib import Path

import pytest

from studies import saved
from studies.reproduction import protocol
from studies.trainability import figures, page, printed, results
from studies.trainability.__main__ import PROTOCOL, STAGES, main

ARMS = ("linear", "linear+balance", "linear+balance, gate rate / 10", "linear+balance, residual", "prototypes+balance")
ARMS += (
    "prototypes+balance, gate rate / 10",
    "spectral",
    "spectral, relative",
    "spectral, norm term alone",
    "spectral, projected",
)


def made_up(level, seeds=20):
    """`level(arm, condition, seed)` is an accuracy; of the stage for the paper's tables there is nothing."""
    plan = protocol.read(PROTOCOL, STAGES)
    runs = [
        {
            "stage": "failure", "phase": one.phase, "arm": f"{arm}, {one.name}", "seed": seed,
            "accuracy": level(arm, one.name, seed), "routing": {"top_path_share": 0.2},
        }
        for one in protocol.conditions(plan) for arm in plan["failure"]["arms"] for seed in range(min(seeds, one.seeds))
    ]  # fmt: skip
    return {"protocol": plan, "runs": runs, "versions": [{"torch": "2"}], "data": {}}


def test_the_protocol_gives_every_arm_every_condition_and_seed():
    plan = protocol.read(PROTOCOL, STAGES)
    assert tuple(plan["failure"]["arms"]) == ARMS
    runs = protocol.runs(plan, "failure", {"photos": "there"})
    conditions = protocol.conditions(plan)
    assert sorted({one.seeds for one in conditions}) == [8, 20]
    assert len(runs) == len({run.name for run in runs}) == len(ARMS) * sum(one.seeds for one in conditions)
    assert {run.seed for run in runs[: len(ARMS) * len(conditions)]} == {0}  # seed by seed
    assert {run.config.gate_lr_scale for run in runs if "gate rate / 10" in run.arm} == {0.1}
    assert {run.config.penalty for run in runs if "projected" in run.arm} == {"project"}
    assert {run.config.layers for run in runs} == {2, 4, 6, 8}
    assert {run.phase for run in protocol.runs(plan, "failure", {})} == {"digits"}  # without photos
    assert not protocol.runs(plan, "main", {})
    assert {(run.phase, run.config.lr) for run in protocol.runs(plan, "main", {"photos": "there"})} == {
        ("photos-4x4", 1.75e-3), ("photos-2x2", 1e-2),
    }  # fmt: skip
    for arm in ARMS:
        control = results.control(arm)
        assert control is None or control in ARMS
        assert control != arm
    assert set(figures.STYLES) <= set(ARMS)


def test_who_trains_and_who_is_better():
    at, other = "digits, 4 layers, rate 3e-3", "photos, 2 layers, rate 1e-2"

    def level(arm, condition, seed):
        wobble = math.sin(7 * seed)
        if arm == "spectral" and condition == at:
            return 60.0 + wobble  # all train, where of the control none does
        if condition == at:
            return 19.9  # below twice the chance of ten classes
        return (55.0 if arm == "spectral, projected" else 60.0) + wobble + 0.3 * math.sin(11 * seed + len(arm))

    runs = results.Runs(made_up(level))
    found = {(test.arm, test.condition): test for test in results.tests(runs)}
    assert found["spectral", at].trained == (20, 0)
    assert (found["spectral", at].trains, found["spectral", at].better) == ("shown", "shown")
    assert (found["spectral, projected", other].trains, found["spectral, projected", other].better) == ("not shown", "refuted")
    assert all(test.trains == "not shown" for key, test in found.items() if key != ("spectral", at))
    assert ("linear+balance", other) not in found
    assert {test.of for test in found.values()} == {8, 20}
    assert runs.chance("photos") == 25
    assert len(runs.edge()) == 9
    # of four classes the same accuracy is below twice chance
    assert results.Runs(made_up(lambda *_: 45.0)).trained("linear", other) == 0
    assert results.Runs(made_up(lambda *_: 45.0)).trained("linear", at) == 20


def test_the_page_says_it_from_the_results(tmp_path):
    plan = made_up(lambda arm, condition, seed: 60.0 if arm.startswith("spectral") else 10.0 + math.sin(seed), seeds=16)
    del plan["runs"][-1]  # of a condition of many seeds: that seed is left out
    files = page.write(plan, tmp_path)
    assert {file.name for file in files} == {
        "trainability.md", "trainability_tables.md", "trainability.png", "trainability_accuracy.png",
    }  # fmt: skip
    text = (tmp_path / "trainability.md").read_text()
    assert "8 to 16 seeds each" in text
    assert "**The paper's penalty on the prototypes**: training more often is shown in 16 of 16 conditions" in text
    assert "**Prototypes instead of a linear gate**: training more often is not shown; a higher accuracy is not shown." in text
    assert re.search(r"\*\*spectral\*\*, against prototypes\+balance: .*digits, 2 layers, rate 3e-3 \(8 against 0 of 8\)", text)
    assert "photos, 8 layers, rate 1e-3 (15 against 0 of 15)" in text
    assert "The paper's tables" not in text
    assert "60.0\u00a0± 0.0" not in (tmp_path / "trainability_tables.md").read_text()
    assert "60.0 ± 0.0, worst 60.0<br>8 of 8 trained" in (tmp_path / "trainability_tables.md").read_text()


def test_the_committed_results_are_the_protocols_and_the_page_is_theirs():
    found = saved.read(results.RESULTS)
    plan = protocol.read(PROTOCOL, STAGES)
    assert found["protocol"] == plan
    wanted = [run for stage in STAGES for run in protocol.runs(plan, stage, {"photos": "there"})]
    assert {(run["stage"], run["phase"], run["arm"], run["seed"]) for run in found["runs"]} == {
        (run.stage, run.phase, run.arm, run.seed) for run in wanted
    }
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / page.PAGE).read_text(encoding="utf-8") == page.page(found)
    assert (docs / page.TABLES).read_text(encoding="utf-8") == page.tables(found)


@pytest.mark.parametrize("gap", [10.0, -10.0])
def test_the_papers_signs_are_judged_against_the_paper(gap):
    plan = made_up(lambda *_: 60.0)
    levels = {"baseline": 70.0, "clustering": 70.0 + gap / 2, "spectral": 70.0 + gap, "baseline+balance": 70.0}
    asked = {"scope": "all", "optimizer": "adam", "lr": 1e-4, "novel_loss_before": 1.0, "novel_loss_after": 0.5}
    plan["runs"] += [
        {
            "stage": "main", "phase": "photos-4x4", "arm": arm, "seed": seed, "accuracy": level + math.sin(seed + len(arm)),
            "routing": {"top_path_share": 1.0 if arm == "baseline" else 0.2},
            "oneshot": [{**asked, "mean_delta": math.sin(3 * seed + len(arm))}],
        }
        for arm, level in levels.items() for seed in range(10)
    ]  # fmt: skip
    text = printed.section(plan)
    signs = re.findall(r"accuracy: (\w+ − \w+) \| \S+ \| .* \| (.*?) \|\n", text)
    assert signs == [(pair, "shown" if gap > 0 else "refuted") for pair in (
        "spectral − baseline", "spectral − clustering", "clustering − baseline",
    )]  # fmt: skip
    assert "70.0 % over 10 seeds" in text.replace("69.9", "70.0").replace("70.1", "70.0")
    assert f"{3 if gap > 0 else 0} are shown to have its sign there, {0 if gap > 0 else 3} the other" in text
    assert "in 10 of 10; of these train 10." in text


@pytest.mark.slow
def test_a_tiny_study_runs_and_goes_on(tmp_path, capsys):
    tiny = tmp_path / "study.toml"
    text = PROTOCOL.read_text()
    for change in (
        ("epochs = 8", "epochs = 1"), ("samples_per_class = 475", "samples_per_class = 20"), ("novel = 25", "novel = 1"),
        ("hidden = 128", "hidden = 8"), (", seeds = 8", ""), ("seeds = [0, 20]", "seeds = [0, 1]"),
    ):  # fmt: skip
        text = text.replace(*change)
    text = re.sub(r'^"digits, [468] layers.*\n', "", text, flags=re.MULTILINE)
    tiny.write_text(text)
    command = ["run", "--protocol", str(tiny), "--out", str(tmp_path / "out")]
    assert main([*command, "--only", "spectral"]) == 0
    done = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out" / "parts").iterdir()}
    assert len(done) == 4 * 2
    assert main(command) == 0
    assert all((tmp_path / "out" / "parts" / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    found = saved.read(tmp_path / "out" / "results.json")
    assert len(found["runs"]) == 10 * 2
    assert results.Runs(found).seeds("digits, 2 layers, rate 1e-2") == [0]
    (tmp_path / "bad.toml").write_text("[settings]\n")
    assert main(["run", "--protocol", str(tmp_path / "bad.toml"), "--out", str(tmp_path / "other")]) == 1
    assert "bad.toml: it must be of the form of study.toml (KeyError: 'data')" in " ".join(capsys.readouterr().err.split())
    assert main(["run", "--photos", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other")]) == 1
    assert "--photos must be a folder" in " ".join(capsys.readouterr().err.split())
