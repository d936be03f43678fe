"""The comparison of all arms: its arithmetic, one small run, and that it resumes to the same result."""

import dataclasses
import json
import re

import pytest
import torch

from examples.image_classification import terms
from examples.image_classification.config import ROUTERS, Config
from examples.image_classification.data import ImageSet
from examples.image_classification.terms import BALANCES, CONTROLLERS, INPLACE, PENALTIES
from examples.shared.command import ExperimentError
from studies.comparison import report, run
from studies.comparison.__main__ import main, parse
from studies.comparison.arms import ARMS, REFERENCE
from studies.oneshot.plasticity import interference

pytestmark = pytest.mark.slow

TINY = (
    *("--classes", "3", "5", "--samples-per-class=24", "--novel=1", "--layers=2", "--experts=2", "--epochs=2", "--seeds=2"),
    *("--batch-size=16", "--dim=8", "--hidden=8", "--image-size=16", "--tuning-seeds=1", "--lr=0.01", "--device=cpu"),
)
SHOWN = ["no penalty", "SpectralRankPenalty", "loss-free bias"]


def test_everything_that_has_a_name_has_an_arm():
    settings = [arm.settings for arm in ARMS.values()]
    assert {setting.get("penalty") for setting in settings} - {None} == {*PENALTIES, *INPLACE} - {"sigma"}  # half of rank
    assert {setting.get("balance") for setting in settings} - {None} == {*BALANCES, *CONTROLLERS}
    assert REFERENCE in ARMS
    assert run.BASE in ARMS


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_it_names_and_is_valid(name):
    base = Config(layers=4, experts=4)
    arm = ARMS[name]
    for strength in arm.candidates() or [None]:
        config = arm.config(base, strength)
        config.validate()
        changed = {key for key, value in dataclasses.asdict(config).items() if value != getattr(base, key)}
        assert changed <= {"routers", *arm.settings, arm.strength}
        assert config.routers[0] in ROUTERS
        # a strength that the router would not use is no strength
        spec = ROUTERS[config.routers[0]]
        if arm.strength is not None:
            assert spec.spectral if arm.strength == "alpha" else spec.balance
    assert len(arm.candidates()) in (0, 4)


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"delta": delta, "loss_before": 2.0, "loss_after": 2.0 * (1 - learned)} for learned, delta in points]


def test_interference_is_read_where_enough_is_learned():
    assert interference(curve((0.5, -1.5)), 0.5) == pytest.approx(-1.5)
    assert interference(curve((1.0, -3.0)), 0.5) == pytest.approx(-1.5)  # halfway from no update
    assert interference(curve((0.2, -0.2), (0.6, -1.0), (0.9, -8.0)), 0.5) == pytest.approx(-0.8)
    assert interference(curve((0.2, -0.2), (0.4, -1.0)), 0.5) is None
    # a rate that makes the image worse is passed over
    assert interference(curve((0.4, -0.4), (-0.5, -9.0), (0.6, -1.4)), 0.5) == pytest.approx(-0.9)
    assert interference(curve((-0.1, 5.0)), 0.2) is None
    unknown = {"delta": -25.0, "loss_before": 2.0, "loss_after": None}
    assert interference([unknown, *curve((0.5, -1.5))], 0.5) == pytest.approx(-1.5)
    assert interference(curve((0.8, -0.8)), 0.25) == pytest.approx(-0.25)


def test_the_best_strength_is_the_weakest_of_the_best():
    assert run._best({0.1: [90.0, 92.0], 1.0: [91.0, 91.0], 10.0: [99.0, 70.0]}) == 0.1
    assert run._best({1.0: [90.0, 92.0], 0.1: [91.0, 91.0]}) == 1.0  # a grid of bounds, the weakest first
    assert run._best({0.1: [1.0], 1.0: [2.0]}) == 1.0
    assert run._best({}) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "TIMED_STEPS", 3)
        assert main([*TINY, "--arms", *SHOWN, "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_a_run_leaves_one_row_an_arm(finished, capsys):
    out, results = finished
    assert set(results["runs"]) == set(SHOWN)
    assert results["tuning"]["no penalty"] == {}
    assert results["chosen"]["no penalty"] is None
    for name in SHOWN[1:]:
        assert len(results["tuning"][name]) == 4
        assert results["chosen"][name] in ARMS[name].grid
    for runs in results["runs"].values():
        assert [entry["seed"] for entry in runs] == [0, 1]
        assert [point["lr"] for point in runs[0]["oneshot"]] == list(run.RATES)
    assert results["step_time"]["no penalty"][0] == 1.0
    assert (out / "comparison.png").stat().st_size > 10_000
    text = (out / "tables.md").read_text()
    for name in SHOWN:
        (line,) = re.findall(rf"^\| {re.escape(name)} \| .*± .*$", text, flags=re.MULTILINE)
        assert line.count("|") == len(report.HEAD) + 1
    # checkpoints are of runs that are not done
    assert not list((out / "models").glob("*.pt"))


def test_differences_are_paired_by_seed(finished):
    _, results = finished
    by_arm = {row[0]: row for row in report.rows(results | {"reference": "no penalty"})}
    place = report.HEAD.index("accuracy − reference, points")
    pairs = zip(results["runs"]["loss-free bias"], results["runs"]["no penalty"], strict=True)
    differences = [one["accuracy"] - other["accuracy"] for one, other in pairs]
    shown, _, half = by_arm["loss-free bias"][place].partition(" ± ")
    assert float(shown) == pytest.approx(sum(differences) / 2, abs=0.005)
    # Student's t with one degree of freedom; the standard deviation of two values is their distance over the root of 2
    assert float(half) == pytest.approx(12.706 * abs(differences[0] - differences[1]) / 2, rel=1e-3, abs=0.006)
    assert by_arm["no penalty"][place] == "–"


def test_arms_of_one_seed_meet_the_same_images(monkeypatch, tmp_path):
    met: dict[str, list] = {}

    def train(config, router, seed, data, split, checkpoint, on_epoch):
        met[checkpoint.stem] = [part.tolist() for part in split]
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", train)
    for number, name in enumerate(["linear gate", "prototypes"]):
        assert main([*TINY, "--arms", name, "--out", str(tmp_path / str(number))]) == 130
    assert set(met) == {"linear-gate-seed0", "prototypes-seed0"}
    assert met["linear-gate-seed0"] == met["prototypes-seed0"]


def test_a_step_without_a_term_does_not_pay_for_it(monkeypatch, tmp_path):
    called = []
    for name in ("penalty", "balance"):
        make = getattr(terms, name)

        def counted(*given, make=make, name=name):
            part = make(*given)
            part.register_forward_hook(lambda *_: called.append(name))
            return part

        monkeypatch.setattr(terms, name, counted)
    monkeypatch.setattr(run, "TIMED_STEPS", 1)
    base = Config(layers=2, experts=2, dim=8, hidden=8, image_size=16)
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(64) % 2, ["a", "b"], [], "none")
    run._times({"prototypes": ARMS["prototypes"].config(base, None)}, data, tmp_path)
    # the base has the balance loss, the bare arm has nothing
    assert "penalty" not in called
    assert called


def test_a_stopped_run_resumes_to_the_same_result(finished, tmp_path, monkeypatch):
    _, results = finished
    monkeypatch.setattr(run, "TIMED_STEPS", 3)
    arguments = [*TINY, "--arms", *SHOWN, "--out", str(tmp_path)]
    adapt, calls = run.oneshot.adapt, []

    def stop(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return adapt(*given)

    monkeypatch.setattr(run.oneshot, "adapt", stop)
    assert main(arguments) == 130
    assert main(arguments) == 1  # neither --resume nor --overwrite
    monkeypatch.setattr(run.oneshot, "adapt", adapt)
    assert main([*arguments, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    for key in ("tuning", "chosen", "runs"):
        assert again[key] == results[key], key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "magic"], r"--arms must be any of linear gate; .*, got magic"),
        (["--tuning-seeds", "0"], r"--tuning-seeds must be at least 1, got 0"),
        (["--epochs", "0"], r"--epochs must be at least 1, got 0"),
    ],
)
def test_messages(flags, message):
    with pytest.raises(ExperimentError, match=message):
        parse(flags)


def test_what_arms_set_has_no_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "--epochs" in text
    for flag in ("--penalty", "--balance", "--alpha", "--beta", "--oneshot-lr", "--routers"):
        assert f"{flag} " not in text
    config, _, names, tuning_seeds = parse([])
    assert (config.layers, config.experts, config.seeds, tuning_seeds) == (4, 4, 5, 2)
    assert names == list(ARMS)
