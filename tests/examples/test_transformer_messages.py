"""What `examples.transformer_moe` says of wrong input."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformer_worker import arguments, write_domains
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer

from examples.transformer_moe import arms, measure, model
from examples.transformer_moe.__main__ import main
from examples.transformer_moe.config import Config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "nothing"], "--arms must be any of none, own, penalty, balance, both, ernie, got nothing"),
        (["--arms", "none", "none"], "--arms must be each named once, got none none"),
        (["--architecture", "gpt2"], "--architecture must be one of mixtral, olmoe, qwen3_moe, gpt_oss, got gpt2"),
        (["--top-k", "9"], "--top-k must be between 1 and the number of experts, 4, got 9"),
        (["--dim", "36"], "--dim must be a multiple of 8 (four heads of even width), got 36"),
        (["--alpha", "-1"], "--alpha must be a finite number of at least 0, got -1.0"),
        (["--sigma-target", "0"], '--sigma-target must be a finite number above 0, or "initial", got 0.0'),
        (["--evaluations", "7"], "--evaluations must be at most --steps, 6, got 7"),
        (["--adapt-evaluations", "7"], "--adapt-evaluations must be at most --adapt-steps, 4, got 7"),
        (["--report-to", "none", "tensorboard"], "--report-to must be none, or reporters, got none tensorboard"),
        (["--fsdp"], "--fsdp must be used with several processes (torchrun, accelerate launch), got one process"),
        (["--adapt-domain", "poems"], "--adapt-domain must be one of letters, numbers, got poems"),
        (["--validation-windows", "999"], "each domain needs a window of 24 tokens for training and 999 for validation"),
        (["--model", "/no/such/model"], "--model cannot read /no/such/model"),
        (["--lr", "nan"], "--lr must be a finite number above 0, got nan"),
    ],
)
def test_messages(tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    write_domains(tmp_path / "data")
    assert main(arguments(tmp_path / "data", tmp_path / "out", *flags)) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_second_run_in_one_folder(tmp_path: Path, capsys) -> None:
    write_domains(tmp_path / "data")
    flags = arguments(tmp_path / "data", tmp_path / "out", "--arms", "none", "--adapt-steps", "0", "--steps", "2")
    assert main(flags) == 0
    assert main(flags) == 1
    assert "already holds a run; pass --resume, --overwrite, or another --out" in " ".join(capsys.readouterr().err.split())
    assert main([*flags, "--resume", "--lr", "0.5"]) == 1
    assert "--lr was 0.01, is 0.5" in capsys.readouterr().err
    for file in (tmp_path / "data" / "letters").iterdir():
        file.write_text("something else entirely " * 30 + file.name)
    assert main([*flags, "--resume"]) == 1
    assert "--resume needs the text that the run in" in " ".join(capsys.readouterr().err.split())
    assert main([*flags, "--overwrite"]) == 0


def test_a_reporter_that_is_not_installed(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("examples.transformer_moe.config.find_spec", lambda name: None)
    assert main(["--report-to", "wandb", "--out", str(tmp_path)]) == 1
    assert "--report-to must be installed (`pip install wandb`), got wandb" in " ".join(capsys.readouterr().err.split())


def test_a_batch_that_does_not_divide(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["--batch-size", "8", "--out", str(tmp_path)]) == 1
    assert "--batch-size must be a multiple of the number of processes, 3, got 8" in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    assert main(["--dataset", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "got 0 and 0 in 'data'" in " ".join(capsys.readouterr().err.split())


def test_a_hub_name_without_datasets(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["--dataset", "some/set", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "a hub data set needs `pip install datasets`" in " ".join(capsys.readouterr().err.split())


def test_columns_that_are_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    fake = SimpleNamespace(load_dataset=lambda *args, **options: iter([{"content": "x"}]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert main(["--dataset", "some/set", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "has no column 'text'; name its columns with --text-column" in " ".join(capsys.readouterr().err.split())


def test_a_hub_data_set_that_is_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    assert main(["--dataset", "some/set", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "no hub data set that can be read: no route" in " ".join(capsys.readouterr().err.split())


def test_a_model_without_an_auxiliary_loss() -> None:
    with pytest.raises(Exception, match="has no auxiliary loss of its own; leave `own` out of --arms"):
        arms.attach(SimpleNamespace(config=SimpleNamespace()), "own", Config())


def test_a_model_without_gates(tmp_path: Path, capsys) -> None:
    write_domains(tmp_path / "data")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "dense")
    model.byte_tokenizer().save_pretrained(tmp_path / "dense")
    assert main(arguments(tmp_path / "data", tmp_path / "out", "--model", str(tmp_path / "dense"))) == 1
    expected = "--model must be a mixture of experts with as many experts in each layer, got LlamaForCausalLM without gates"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_without_an_end(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(model.AutoTokenizer, "from_pretrained", lambda name: SimpleNamespace(eos_token_id=None))
    assert main(["--model", "some/model", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "--model needs a tokenizer with an end-of-text token, got none in some/model" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("no space left"), SafetensorError("no space left")])
@pytest.mark.parametrize("place", ["checkpoint", "model"])
def test_a_full_disk(tmp_path: Path, capsys, monkeypatch, place: str, error: Exception) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    write_domains(tmp_path / "data")
    monkeypatch.setattr(
        *((Trainer, "_save_checkpoint") if place == "checkpoint" else (PreTrainedModel, "save_pretrained")), fail
    )
    # a single measurement leaves no checkpoint, only the model
    flags = ["--arms", "none", "--evaluations", "2" if place == "checkpoint" else "1"]
    assert main(arguments(tmp_path / "data", tmp_path / "out", *flags)) == 1
    folder = tmp_path / "out" / ("work/none-seed0/train" if place == "checkpoint" else "models/none-seed0")
    expected = f"cannot write {folder}: no space left; make room, or choose another --out; what was saved before is intact"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_gates_that_hide_their_choice() -> None:
    gate = nn.Linear(3, 4)
    with (
        pytest.raises(Exception, match="the gate g hands out no chosen experts; --model must be one whose gates return"),
        measure._choices([SimpleNamespace(name="g", module=gate)]),  # type: ignore[list-item]
    ):
        gate(torch.zeros(2, 3))
