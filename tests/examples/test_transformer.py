"""`python -m examples.transformer_moe`, tiny, from end to end."""

import json
from pathlib import Path

import pytest
import torch
from pictures import without_pictures
from safetensors.torch import load_file
from transformer_worker import arguments, write_domains
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.shared.storage import read_json, write_json
from examples.transformer_moe import arms, config, data, model, train
from examples.transformer_moe.__main__ import main
from examples.transformer_moe.whole import WHOLE, is_whole, seal
from spectral_router import find_gates
from spectral_router.functional import stable_rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "data"
    write_domains(folder)
    return folder


@pytest.fixture(scope="module")
def ran(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(arguments(text, out, "--report-to", "tensorboard")) == 0
    return out


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(found: dict) -> dict:
    for runs in found["runs"].values():
        for run in runs:
            for phase in ("train", "adapt"):
                del run[phase]["tokens_per_second"]
    return found["runs"]


def test_what_is_left_behind(ran: Path) -> None:
    found = results(ran)
    assert set(found["summary"]) == set(config.ARMS)
    for runs in found["runs"].values():
        history = runs[0]["train"]["history"]
        assert [row["step"] for row in history] == [0, 3, 6]
        assert [row["step"] for row in runs[0]["adapt"]["history"]] == [0, 2, 4]
        # the adaptation begins where training ended
        assert runs[0]["adapt"]["history"][0]["domains"] == pytest.approx(history[-1]["domains"], abs=1e-6)
    pictures = {"loss.png", "load.png", "gates.png", "domains.png", "adaptation.png"}
    assert {path.name for path in (ran / "figures").iterdir()} == pictures
    assert not list((ran / "work").iterdir())
    tables = (ran / "tables.md").read_text()
    assert "### Differences to none, paired by seed" in tables
    assert "### Differences to own, paired by seed" in tables
    told = results(ran)["data"]["specialisation_by_token"]
    assert f"| the same, by the byte alone | {' | '.join([f'{told:.3f}'] * len(config.ARMS))} |" in tables
    assert "Share of the strings of 24 bytes of validation that are in the training text too: letters 0." in tables


def test_every_arm_begins_alike_and_goes_its_own_way(ran: Path) -> None:
    runs = results(ran)["runs"]
    begun = [runs[arm][0]["train"]["history"][0] for arm in config.ARMS]
    assert all(row == begun[0] for row in begun)
    ended = {runs[arm][0]["train"]["history"][-1]["stable_rank"][0] for arm in config.ARMS}
    assert len(ended) == len(config.ARMS)


@pytest.mark.usefixtures("no_pictures")
def test_without_coefficients_every_arm_is_none(text: Path, tmp_path: Path) -> None:
    """So the arms differ in their term only: weights, batches, steps, clipping and measurements are the same."""
    coefs = ["--alpha", "0", "--beta", "0", "--own-coef", "0"]
    assert main(arguments(text, tmp_path, *coefs)) == 0
    runs = without_times(results(tmp_path))
    expected = runs["none"][0]
    for arm in config.ARMS:
        for phase in ("train", "adapt"):
            assert runs[arm][0][phase] == expected[phase], arm


def test_the_trained_model_is_one_of_transformers(ran: Path) -> None:
    folder = ran / "models" / "both-seed0"
    network = AutoModelForCausalLM.from_pretrained(folder)
    (rank,) = results(ran)["runs"]["both"][0]["train"]["history"][-1]["stable_rank"]
    assert stable_rank(find_gates(network)[0].weight).item() == pytest.approx(rank, rel=1e-5)
    assert torch.load(folder / "routers.pt")["penalty"]["anchor"].shape == (1,)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab"


def test_tensorboard_has_the_routers_by_layer(ran: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(ran / "logs" / "both-seed0" / "train"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"eval/loss_letters", "eval/load_cv/layer_1", "train/router/model.layers.0.mlp.gate/stable_rank"} <= set(tags)
    assert [event.step for event in board.Scalars("eval/loss")] == [0, 3, 6]


def test_saving_is_the_same_with_us(text: Path, tmp_path: Path) -> None:
    settings, _ = config.parse(arguments(text, tmp_path))
    for arm in ("none", "both"):
        network = model.build(settings, seed=0)
        arms.attach(network, arm, settings)
        network.save_pretrained(tmp_path / arm)
    files = {path.name for path in (tmp_path / "none").iterdir()}
    assert files == {path.name for path in (tmp_path / "both").iterdir()} >= {"config.json", "model.safetensors"}
    for name in files:
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    assert "routers.pt" not in files


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("arm", ["own", "both"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(ran: Path, text: Path, tmp_path: Path, monkeypatch, arm: str) -> None:
    from transformer_worker import interrupted

    # put back at the end
    monkeypatch.setattr(train.Watch, "__init__", train.Watch.__init__)
    monkeypatch.setattr(train.Watch, "on_step_end", train.Watch.on_step_end)
    interrupted([("train", 5), ("adapt", 3)])
    flags = arguments(text, tmp_path, "--arms", arm)
    assert main(flags) == 130
    assert (tmp_path / "work" / f"{arm}-seed0" / "train" / "checkpoint-3" / WHOLE).exists()
    # what a kill in the middle of saving leaves
    half = tmp_path / "work" / f"{arm}-seed0" / "train" / "checkpoint-5"
    half.mkdir()
    (half / "config.json").write_text("{")
    assert main([*flags, "--resume"]) == 130
    assert main([*flags, "--resume"]) == 0
    assert without_times(results(tmp_path))[arm] == without_times(results(ran))[arm]
    weights = [load_file(out / "models" / f"{arm}-seed0" / "model.safetensors") for out in (ran, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_diverged_run_resumes(text: Path, tmp_path: Path) -> None:
    flags = arguments(text, tmp_path, "--arms", "none", "both", "--lr", "1e30")
    assert main(flags) == 0
    first = (tmp_path / "results.json").read_bytes()
    tables = (tmp_path / "tables.md").read_text()
    found = results(tmp_path)
    assert found["runs"]["both"][0]["train"]["history"][-1]["loss"] is None
    assert found["summary"]["both"]["forgetting_at_common_gain"]["mean"] is None
    with without_pictures():  # of the same results, once is enough
        assert main([*flags, "--resume"]) == 0
    assert (tmp_path / "results.json").read_bytes() == first
    assert (tmp_path / "tables.md").read_text() == tables


@pytest.mark.usefixtures("no_pictures")
def test_fine_tuning_a_folder(ran: Path, text: Path, tmp_path: Path) -> None:
    folder = ran / "models" / "none-seed0"
    options = ["--model", str(folder), "--arms", "none", "penalty", "--adapt-steps", "0"]
    assert main(arguments(text, tmp_path, *options)) == 0
    before = results(ran)["runs"]["none"][0]["train"]["history"][-1]
    found = results(tmp_path)
    assert found["adapt_domain"] is None
    for arm in ("none", "penalty"):
        assert found["runs"][arm][0]["train"]["history"][0]["loss"] == pytest.approx(before["loss"], abs=1e-6)


def test_a_single_domain_has_no_adaptation(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{number:04} and " for number in range(900)))
    assert main(arguments(file, tmp_path / "out", "--arms", "none", "--steps", "2")) == 0
    found = results(tmp_path / "out")
    assert found["adapt_domain"] is None
    assert found["summary"]["none"]["specialisation"]["mean"] is None
    assert "domain" not in (tmp_path / "out" / "tables.md").read_text()
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {"loss.png", "load.png", "gates.png"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("architecture", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_other_architectures(text: Path, tmp_path: Path, architecture: str) -> None:
    options = ["--architecture", architecture, "--arms", "own", "both", "--adapt-steps", "0", "--steps", "2"]
    assert main(arguments(text, tmp_path, *options, "--evaluations", "1")) == 0
    for runs in results(tmp_path)["runs"].values():
        first, last = runs[0]["train"]["history"]
        assert last["loss"] < first["loss"]


def test_each_seed_has_batches_of_its_own_that_all_arms_share(text: Path, tmp_path: Path) -> None:
    settings, _ = config.parse(arguments(text, tmp_path))
    loaded = data.load(settings, model.tokenizer(settings))
    first, again, other = (data.draw(loaded, settings, seed, 6).rows for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    starts = [model.build(settings, seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_checkpoint_is_left_aside(ran: Path, text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from transformer_worker import interrupted

    monkeypatch.setattr(train.Watch, "__init__", train.Watch.__init__)
    monkeypatch.setattr(train.Watch, "on_step_end", train.Watch.on_step_end)
    interrupted([("train", 5), ("adapt", 3)])
    flags = arguments(text, tmp_path, "--arms", "both")
    assert main(flags) == 130
    weights = tmp_path / "work" / "both-seed0" / "train" / "checkpoint-3" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1  # one bit of one weight
    weights.write_bytes(bytes(raw))
    assert main([*flags, "--resume"]) == 130  # from the start, as no other one is whole
    assert main([*flags, "--resume"]) == 0
    assert without_times(results(tmp_path))["both"] == without_times(results(ran))["both"]
    # what the second phase begins with
    part = tmp_path / "parts" / "both-seed0.json"
    saved = read_json(part)
    write_json(part, {key: value for key, value in saved.items() if key not in ("adapt", "complete")})
    (tmp_path / "models" / "both-seed0" / "config.json").write_text("[]")
    capsys.readouterr()
    assert main([*flags, "--resume"]) == 1
    assert "both-seed0: it is not as it was written; begin anew with --overwrite" in " ".join(capsys.readouterr().err.split())


def test_a_folder_is_whole_or_not(tmp_path: Path) -> None:
    assert not is_whole(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("one", "a/two"):
        (tmp_path / name).write_text(name)
    assert not is_whole(tmp_path)
    seal(tmp_path)
    assert is_whole(tmp_path)
    changes = [("one", "onf"), ("a/two", ""), ("new", "new"), (WHOLE, "{}"), (WHOLE, "[]"), (WHOLE, "")]
    for name, text in changes:
        (tmp_path / name).write_text(text)
        assert not is_whole(tmp_path), name
        (tmp_path / "new").unlink(missing_ok=True)
        for kept in ("one", "a/two"):
            (tmp_path / kept).write_text(kept)
        seal(tmp_path)
    (tmp_path / "one").unlink()
    assert not is_whole(tmp_path)
