"""The reproduction study: its protocol makes the right runs, processes share them, the choice follows its rules."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.image_classification.config import Config
from examples.shared.command import ExperimentError
from examples.shared.storage import write_json
from studies import queue
from studies.reproduction import choice, protocol, saved
from studies.reproduction.__main__ import main

pytestmark = pytest.mark.slow

TINY = """
[settings]
dim = 8
hidden = 8
epochs = 1
batch_size = 16
lr = 1e-2
novel = 1
anchor = 4
device = "cpu"
[data.digits]
data = "mnist"
image_size = 16
classes = ["3", "5"]
samples_per_class = 24
[data.photos]
image_size = 16
[[oneshot.rules]]
name = "first"
scope = "all"
optimizer = "adam"
rates = [1e-4, 1e-3]
plasticity = 0.001
[[oneshot.rules]]
name = "second"
scope = "path"
optimizer = "sgd"
rates = [1e-2]
plasticity = 0.001
[failed]
accuracy_below = 0.0
one_path = 0.99
[main]
seeds = [0, 2]
within = "test"
[main.phases.digits-2x2]
data = "digits"
layers = 2
experts = 2
routers = ["baseline", "spectral"]
[main.phases.photos-2x2]
data = "photos"
layers = 2
experts = 2
routers = ["baseline"]
[sweep]
phase = "digits-2x2"
seeds = [1000, 1]
within = "val"
novel = 1
rules = ["first"]
routers = ["spectral", "baseline"]
center = "spectral"
[sweep.factors]
alpha = [0.1]
temperature = [1.0]
[second]
seeds = [1100, 1]
[confirm]
seeds = [2000, 2]
within = "test"
routers = ["baseline"]
alpha_level = 0.05
[failure]
phase = "digits-2x2"
seeds = [3000, 1]
within = "test"
[failure.conditions]
"high rate" = { lr = 1.0 }
[failure.arms]
"baseline" = { routers = ["baseline"] }
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


def test_the_protocol_of_the_study_is_whole():
    plan = protocol.read()
    names: list[str] = []
    for stage in ("sweep", "main", "failure"):
        assert protocol.runs(plan, stage, {"photos": "folder"})
        names += [one.name for one in protocol.runs(plan, stage, {"photos": "folder"})]
    assert len(set(names)) == len(names)
    # the flags are written down: a default that changes must not change the study
    written = set(plan["settings"]) | {"routers", "layers", "experts", "samples_per_class", "data", "image_size", "classes"}
    by_rule = {"oneshot_lr", "oneshot_optimizer", "scope"}
    unused = {"seeds", "device", "compile", "bound", "bias_rate", "augment", "rank_target", "gate_lr_scale"}
    assert written | by_rule | unused == set(Config.__dataclass_fields__)
    # nobody's tuning seed is a seed of a test
    seeds = {stage: set(range(first, first + count)) for stage in protocol.STAGES for first, count in [plan[stage]["seeds"]]}
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values()))


def test_without_photos_only_the_embedded_part_runs():
    plan = protocol.read()
    assert protocol.runs(plan, "sweep", {}) == []
    assert {one.phase for one in protocol.runs(plan, "main", {})} == {"digits-4x4", "digits-2x2"}


def test_a_run_is_what_its_arm_says(tiny):
    plan = protocol.read(tiny)
    swept = {one.arm: one for one in protocol.runs(plan, "sweep", {})}
    assert list(swept) == ["spectral", "baseline", "alpha 0.1", "temperature 1.0"]
    assert swept["alpha 0.1"].config.alpha == 0.1
    assert swept["alpha 0.1"].config.routers == ["spectral"]
    assert swept["alpha 0.1"].within == "val"
    assert [tuple(rule) for rule in swept["spectral"].rules] == [("all", "adam", 1e-4), ("all", "adam", 1e-3)]
    (failing,) = protocol.runs(plan, "failure", {})
    assert (failing.config.lr, failing.config.routers, failing.rules) == (1.0, ["baseline"], [])


def entry(arm: str, accuracy: float, delta: float, learned: float = 0.5) -> dict[str, object]:
    point = {"scope": "all", "optimizer": "adam", "lr": 1e-4, "mean_delta": delta, "novel_loss_before": 1.0}
    return {"arm": arm, "accuracy": accuracy, "oneshot": [point | {"novel_loss_after": 1 - learned}]}


def test_candidates_are_better_and_harm_no_more(tiny):
    plan = protocol.read(tiny)
    plan["sweep"]["factors"] = {"alpha": [0.1, 0.2], "temperature": [1.0], "beta": [0.0], "sigma_target": [2.0], "dim": [16]}
    swept = [
        entry("spectral", 80.0, -1.0),
        entry("alpha 0.1", 85.0, -0.5),
        entry("alpha 0.2", 84.0, -0.1),  # the second best level of its factor
        entry("temperature 1.0", 90.0, -3.0),  # harms more
        entry("beta 0.0", 82.0, -1.0),
        entry("sigma_target 2.0", 79.0, 0.0),  # less accurate
        entry("dim 16", 88.0, -0.2, learned=0.0001),  # never learns as much: what it costs is not known
    ]
    arms = choice.candidates(plan, swept)
    assert list(arms) == ["spectral", "alpha 0.1", "beta 0.0", "beta 0.0, alpha 0.1"]
    assert arms["beta 0.0, alpha 0.1"] == {"routers": ["spectral"], "alpha": 0.1, "beta": 0.0}
    assert choice.winner([entry("a", 1.0, 0), entry("b", 3.0, 0), entry("a", 4.0, 0)]) == "b"


def test_the_cost_leaves_failed_runs_out(tiny):
    plan = protocol.read(tiny)
    plan["failed"]["accuracy_below"] = 50.0
    plan["oneshot"]["rules"][0]["plasticity"] = 0.5
    assert choice.cost(plan, [entry("a", 80.0, -2.0), entry("a", 25.0, 0.0)]) == pytest.approx(-2.0)
    assert choice.cost(plan, [entry("a", 80.0, -2.0), entry("a", 80.0, -2.0, learned=0.1)]) is None
    assert choice.cost(plan, [entry("a", 25.0, 0.0)]) is None


def test_the_study_runs_is_shared_and_goes_on(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    # what another process has claimed is left to it
    first = protocol.runs(protocol.read(tiny), "main", {})[0]
    with queue.claim(out, first) as mine, queue.claim(out, first) as again:
        assert mine
        assert not again
    command = ["run", "--protocol", str(tiny), "--out", str(out)]
    assert main([*command, "--stages", "main", "--only", "seed0"]) == 0
    done = {file.name: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}
    assert sorted(done) == ["main.digits-2x2.baseline.seed0.json", "main.digits-2x2.spectral.seed0.json"]
    assert main(command) == 0
    assert all((out / "parts" / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    assert not list((out / "models").iterdir())
    results = saved.read(out / "results.json")
    stages = [one["stage"] for one in results["runs"]]
    assert {stage: stages.count(stage) for stage in protocol.STAGES} == {
        "sweep": 4,
        "main": 4,
        "second": len({one["arm"] for one in results["runs"] if one["stage"] == "second"}),
        "confirm": 4,
        "failure": 1,
    }
    main_run = next(one for one in results["runs"] if one["stage"] == "main")
    assert len(main_run["oneshot"]) == 3
    assert set(main_run["oneshot"][0]["delta"]) == {"3", "5"}
    assert "path_counts" in main_run["routing"]
    assert results["data"]["digits-2x2"]["images"] == 48


def test_a_run_alone_gives_what_it_gave_among_others(tiny, tmp_path):
    """In a process of its own: nothing may hang on what ran before."""
    command = ["run", "--protocol", str(tiny), "--stages", "main"]
    assert main([*command, "--out", str(tmp_path / "all")]) == 0
    alone = [*command, "--out", str(tmp_path / "one"), "--only", "spectral.seed1"]
    subprocess.run([sys.executable, "-m", "studies.reproduction", *alone], check=True, capture_output=True)
    name = "parts/main.digits-2x2.spectral.seed1.json"
    first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("all", "one"))
    for record in (first, second):
        del record["training_seconds"], record["sha256"]  # which is of the rest, these seconds too
    assert first == second


def test_what_a_process_that_died_has_left_is_done(tiny, tmp_path, monkeypatch):
    """A run that was claimed when its turn came, and whose owner is gone when nothing else is left."""
    out, wanted = tmp_path / "out", protocol.runs(protocol.read(tiny), "main", {})
    owner = queue.claim(out, wanted[0])
    assert owner.__enter__()
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: owner.__exit__(None, None, None))
    assert main(["run", "--protocol", str(tiny), "--out", str(out), "--stages", "main"]) == 0
    assert len(list((out / "parts").iterdir())) == len(wanted)


def test_one_run_waits_for_no_stage_before_it(tiny, tmp_path, capsys):
    command = ["run", "--protocol", str(tiny), "--out", str(tmp_path / "out"), "--only"]
    assert main([*command, "failure"]) == 0
    assert "stage second left out: it needs 4 runs of the stage before it" in capsys.readouterr().err
    assert main([*command, "no such run"]) == 1
    assert "--only must be part of the name of a run, got no such run" in capsys.readouterr().err
    assert main([*command[:-1], "--stages", "second"]) == 1
    assert "it needs 4 runs of the stage before it, the first sweep." in capsys.readouterr().err


def test_a_folder_is_of_one_protocol_and_of_one_set_of_images(tiny, tmp_path, capsys):
    command = ["run", "--protocol", str(tiny), "--out", str(tmp_path / "out"), "--only", "main.digits-2x2.baseline.seed0"]
    assert main(command) == 0
    (images,) = (tmp_path / "out" / "images").iterdir()
    write_json(images, {"digest": "other"})
    (tmp_path / "out" / "parts" / "main.digits-2x2.baseline.seed0.json").unlink()
    assert main(command) == 1
    assert "--photos must be the images that --out began with" in capsys.readouterr().err
    tiny.write_text(TINY.replace("hidden = 8", "hidden = 9"), encoding="utf-8")
    assert main(command) == 1
    assert "--out must be of one protocol, got another one" in capsys.readouterr().err


def test_bad_input_gets_a_sentence(tiny, tmp_path, capsys):
    assert main(["run", "--photos", str(tmp_path / "none")]) == 1
    assert "--photos must be a folder with one subfolder of images a class" in capsys.readouterr().err
    tiny.write_text("[settings\n", encoding="utf-8")
    assert main(["run", "--protocol", str(tiny)]) == 1
    assert "--protocol must be a readable TOML file" in capsys.readouterr().err
    assert main(["page", "--results", str(tmp_path / "none.json")]) == 1
    assert "--results must be a file that `run` wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (TINY, 'name = "another program"', r"it must be of the form of study.toml \(KeyError: 'data'\)"),
        (TINY, "", r"it must be of the form of study.toml \(KeyError"),
        ("dim = 8", 'dim = "8"', "--dim must be a whole number, got 8"),
        ("epochs = 1", "epochs = 1.5", "--epochs must be a whole number, got 1.5"),
        ("epochs = 1", "epochs = 0", "--epochs must be at least 1, got 0"),
        ("dim = 8", "dims = 8", "dims is no setting; there are data, "),
        ('classes = ["3", "5"]', 'classes = "3"', "--classes must be a list, got 3"),
        ("[0, 2]", "[0]", "it must be of the form of study.toml"),
        ("[0, 2]", '"all"', "it must be of the form of study.toml"),
        ('seeds = [1000, 1]\nwithin = "val"', 'seeds = [1000, 1]\nwithin = "train"', "--within must be test or val, got train"),
        ('scope = "path"', 'scope = "paths"', "--scope must be one of all, experts, path, got paths"),
        ("rates = [1e-2]", "rates = [-1.0]", "--oneshot-lr must be a finite number above 0, got -1.0"),
        ("rates = [1e-2]", 'rates = ["fast"]', "--oneshot-lr must be a number, got fast"),
        ('rules = ["first"]', 'rules = ["third"]', r"it must be of the form of study.toml \(StopIteration"),
        ('center = "spectral"', 'center = "clustering"', "--center must be one of the sweep's arms, got clustering"),
        ("plasticity = 0.001", 'plasticity = "some"', "--plasticity must be a number, got some"),
        ("anchor = 4", "anchor = 4\noneshot_steps = 2", "--oneshot-steps must be 1, got 2"),
        ('routers = ["baseline", "spectral"]', "routers = 3", "it must be of the form of study.toml"),
    ],
)
def test_a_protocol_of_another_form_is_refused_before_the_work(before, after, says, tmp_path, capsys):
    assert before in TINY
    file = tmp_path / "other.toml"
    file.write_text(TINY.replace(before, after, 1), encoding="utf-8")
    assert main(["run", "--protocol", str(file), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert re.match(rf"error: --protocol {file}: {says}", told), told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "{}", '{"protocol": {}, "runs": []}', '{"protocol": {"main": {"phases": {}}}, "runs": [{"stage": "main"}]}'],
)
def test_results_of_another_program_make_no_page(text, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(text)
    assert main(["page", "--results", str(file), "--docs", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: --results must be a file that `run` wrote")


def test_a_folder_of_another_run_is_not_mixed_with(tiny, tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    assert main(["run", "--protocol", str(tiny), "--out", str(tmp_path)]) == 1
    assert "--out must be a folder of this study or a new one" in capsys.readouterr().err


def test_other_images_in_one_study_are_refused():
    record = {"phase": "p", "seed": 3, "data": {"digest": "a"}, "versions": {}, "device": "cpu"}
    other = copy.deepcopy(record)
    other["data"] = {"digest": "b"}
    with pytest.raises(ExperimentError, match="runs of p must have the same images"):
        saved.gather({}, [record, other])


def test_the_committed_results_are_the_protocols():
    results = saved.read()
    assert results["protocol"] == protocol.read()
    assert saved.RESULTS.stat().st_size < 2_000_000
    have = {(one["stage"], one["phase"], one["arm"], one["seed"]) for one in results["runs"]}
    for stage in ("sweep", "main", "failure"):
        wanted = protocol.runs(results["protocol"], stage, {"photos": "folder"})
        assert {(one.stage, one.phase, one.arm, one.seed) for one in wanted} == {key for key in have if key[0] == stage}
    swept = [one for one in results["runs"] if one["stage"] == "sweep"]
    arms = choice.candidates(results["protocol"], swept)
    assert {one["arm"] for one in results["runs"] if one["stage"] == "second"} == set(arms)
    chosen = choice.winner([one for one in results["runs"] if one["stage"] == "second"])
    confirmed = {one["arm"] for one in results["runs"] if one["stage"] == "confirm"}
    assert confirmed == {chosen, *results["protocol"]["confirm"]["routers"]}
