"""`python -m examples.transformer_moe.finetune --quick`, from end to end, stopped and resumed; and its numbers by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformer_worker import interrupted, write_domains

from examples.transformer_moe import finetune, finetune_summary, measure, train
from examples.transformer_moe.config import FINETUNING


def flags(text: Path, out: Path, *others: str) -> list[str]:
    small = "--quick --layers 1 --sequence 24 --batch-size 4 --adapt-lr 0.01 --alpha 1.0 --device cpu --report-to none"
    return [*small.split(), "--dataset", str(text), "--out", str(out), *others]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "data"
    write_domains(folder)
    return folder


@pytest.fixture(scope="module")
def ran(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert finetune.main(flags(text, out)) == 0
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_every_arm_goes_on_from_the_trained_model(ran: Path) -> None:
    found = results(ran)
    assert set(found["runs"]) == set(FINETUNING)
    assert found["domain"] == "letters"
    for seed in range(2):
        end = found["trained"][seed]["train"]["history"][-1]
        starts = [found["runs"][arm][seed]["finetune"]["history"][0] for arm in FINETUNING]
        assert all(row == starts[0] for row in starts)
        assert starts[0]["domains"] == pytest.approx(end["domains"], abs=1e-6)
        assert set(starts[0]["rerouted"].values()) == {0.0}
        ended = {arm: found["runs"][arm][seed]["finetune"]["history"][-1]["stable_rank"][0] for arm in FINETUNING}
        assert len(set(ended.values())) >= 4  # what holds may have nothing to do
        assert ended["spread"] > max(ended["none"], ended["hold"], starts[0]["stable_rank"][0])


def test_the_tables_hold_every_arm_and_the_differences(ran: Path) -> None:
    tables = (ran / "tables.md").read_text()
    assert f"| | {' | '.join(FINETUNING)} |" in tables
    assert "#### Differences to none, paired by seed" in tables
    assert "2 gates" not in tables
    assert "1 gates" in tables
    rows = [line for line in tables.splitlines() if line.startswith("| Stable rank of the gates, before")]
    assert len(rows) == 1
    assert len(set(rows[0].split("|")[2:-1])) == 1


def test_a_stopped_study_goes_on_as_if_nothing_had_been(ran: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    # put back at the end
    monkeypatch.setattr(train.Watch, "__init__", train.Watch.__init__)
    monkeypatch.setattr(train.Watch, "on_step_end", train.Watch.on_step_end)
    interrupted([("train", 11), ("finetune", 7)])
    command = flags(text, tmp_path, "--arms", "hold", "--seeds", "1")
    assert [finetune.main([*command, *again]) for again in ([], ["--resume"], ["--resume"])] == [130, 130, 0]
    expected, found = (results(out)["runs"]["hold"][0]["finetune"]["history"] for out in (ran, tmp_path))
    assert found == expected
    weights = [load_file(out / "models" / "trained-seed0" / "model.safetensors") for out in (ran, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_messages(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{number:04} and " for number in range(900)))
    for command, message in (
        (flags(text, tmp_path, "--arms", "ernie"), "--arms must be any of none, spread, hold, balance, both, hold+balance"),
        (flags(text, tmp_path, "--adapt-steps", "0"), "--adapt-steps must be at least 1, got 0"),
        (flags(file, tmp_path / "out"), "--dataset must hold two domains at least, one to learn and one to forget"),
    ):
        assert finetune.main(command) == 1
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- numbers by hand


def test_rerouted_is_of_sets() -> None:
    before = torch.tensor([[[[[0, 1]], [[2, 3]], [[1, 4]]]]])  # a domain, a window, three tokens, a layer, two experts
    after = torch.tensor([[[[[1, 0]], [[2, 4]], [[1, 4]]]]])  # the order changes, an expert changes, nothing changes
    assert measure.rerouted(before, after).tolist() == [[pytest.approx(1 / 3)]]


def phase(gains: list[float], losses: list[float], moved: list[float]) -> dict:
    return {
        "history": [
            {
                "loss": 2.0,
                "domains": {"new": 2.0 - gain, "old": 2.0 + loss},
                "rerouted": {"new": 0.5, "old": share},
                "stable_rank": [2.0, 4.0],
                "spectral_norm": [1.0, 2.0],
                "load_cv": [0.0, 1.0],
                "dead": [1, 2],
            }
            for gain, loss, share in zip(gains, losses, moved, strict=True)
        ]
    }


def test_numbers_at_equal_gain_are_read_off_the_lines_between_measurements() -> None:
    fast, slow = (
        phase([0.0, 0.2, 0.4], [0.0, 0.1, 0.3], [0.0, 0.3, 0.5]),
        phase([0.0, 0.1, 0.3], [0.0, 0.1, 0.1], [0.0, 0.0, 0.2]),
    )
    found = finetune_summary.of({"none": [{"finetune": fast}], "hold": [{"finetune": slow}]}, "new")
    none, hold = found["summary"]["none"], found["summary"]["hold"]
    means = {name: (none[name]["mean"], hold[name]["mean"]) for name in none}
    assert means["gain"] == pytest.approx((0.4, 0.3))
    assert means["common_gain"] == pytest.approx((0.3, 0.3))
    assert means["forgetting_at_common_gain"] == pytest.approx((0.2, 0.1))
    assert means["rerouted_at_common_gain"] == pytest.approx((0.4, 0.2))
    assert means["rerouted_old"] == pytest.approx((0.5, 0.2))
    assert means["stable_rank"] == pytest.approx((3.0, 3.0))
    assert means["dead"] == pytest.approx((3.0, 3.0))
    assert found["differences"]["hold"]["rerouted_at_common_gain"]["mean"] == pytest.approx(-0.2)


def test_a_diverged_arm_has_no_part_in_it() -> None:
    good, bad = phase([0.0, 0.2], [0.0, 0.1], [0.0, 0.3]), phase([0.0, 0.1], [0.0, 0.1], [0.0, 0.2])
    bad["history"][1]["domains"]["new"] = None
    found = finetune_summary.of({"none": [{"finetune": good}], "spread": [{"finetune": bad}]}, "new")
    assert found["summary"]["none"]["rerouted_at_common_gain"]["mean"] == pytest.approx(0.3)
    assert found["summary"]["spread"]["rerouted_at_common_gain"]["mean"] != found["summary"]["spread"]["gain"]["mean"]
    assert found["summary"]["spread"]["rerouted_at_common_gain"]["n"] == 1
    assert found["summary"]["spread"]["gain"]["mean"] != found["summary"]["spread"]["gain"]["mean"]  # NaN
