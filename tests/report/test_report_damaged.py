"""500 damaged files: each is read rightly or refused in one sentence; no traceback, no hang, no code of theirs."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from report_checkpoints import weights
from test_report_formats import save_dcp, save_gguf, save_nested, save_old, save_plain, save_safetensors

from spectral_router import inspect_checkpoint

EACH, SECONDS = 100, 10.0
FORMATS = {"safetensors": save_safetensors, "plain": save_plain, "old": save_old, "nested": save_nested, "dcp": save_dcp}
FORMATS["gguf"] = save_gguf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def damage(content: bytes, chance: random.Random) -> bytes:
    """One of: cut off, bytes changed anywhere or in the head, a piece left out, doubled or zeroed, a number made large."""
    kind, size = chance.randrange(7), len(content)
    data = bytearray(content)
    place = chance.randrange(size)
    if kind == 0:
        return content[:place]
    if kind == 1:
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(size)] = chance.randrange(256)
    elif kind == 2:
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(min(size, 600))] = chance.randrange(256)
    elif kind == 3:
        del data[place : place + chance.randrange(1, 400)]
    elif kind == 4:
        data[place:place] = data[place : place + chance.randrange(1, 400)]
    elif kind == 5:
        data[place : place + 64] = bytes(64)
    else:
        data[place : place + 8] = b"\xff" * 7 + b"\x7f"
    return bytes(data)


def outcome(path: Path) -> str:
    """The sentence with which it is refused, empty if it is read."""
    try:
        report = inspect_checkpoint(path)
    except ValueError as error:
        return str(error)
    assert all(gate.verdict for gate in report.gates)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    source = FORMATS[name](weights(), tmp_path)
    file = source
    if source.is_dir():
        file = source / {"safetensors": "model.safetensors", "dcp": ".metadata"}[name]
    content, chance, refused = file.read_bytes(), random.Random(0), 0
    for number in range(EACH):
        file.write_bytes(damage(content, chance))
        start = time.perf_counter()
        said = outcome(source)
        refused += said != ""
        assert "\n" not in said, number
        assert len(said) < 600, number
        assert time.perf_counter() - start < SECONDS, number
    assert refused > EACH // 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_configs_of_anything_are_built_or_named(tmp_path: Path) -> None:
    """Settings that are no settings: then names and shapes decide, and it is said why."""
    from moe_models import mixtral

    mixtral().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    chance, named = random.Random(0), 0
    odd = [None, -1, 0, 3, 2**31, 2**62, 1e30, float("inf"), "x", "", [], {}, [1, 2], True, "../../etc", {"a": 1}]
    inspect_checkpoint(tmp_path)  # transformers is imported now
    for number in range(EACH):
        changed = {**settings, **{chance.choice(list(settings)): chance.choice(odd) for _ in range(chance.randint(1, 3))}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        start = time.perf_counter()
        try:
            report = inspect_checkpoint(tmp_path)
        except ValueError as error:
            message = str(error)
        else:
            message = " ".join(report.notes)
            assert len(report.gates) == 2, number
        named += message != ""
        assert "\n" not in message, number
        assert time.perf_counter() - start < SECONDS, number
    assert named > EACH // 2
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2_001}))
    assert "config.json states num_hidden_layers=2001, which is not built" in inspect_checkpoint(tmp_path).notes[0]


def test_the_command_says_one_sentence_on_a_damaged_file(tmp_path: Path) -> None:
    file = save_plain(weights(), tmp_path)
    file.write_bytes(file.read_bytes()[:3000])
    code = "import sys; from spectral_router.report.command import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "inspect", file], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "is no file of torch.save, or is damaged" in done.stderr


def test_damage_changes_files() -> None:
    content = bytes(torch.arange(256).tolist()) * 20
    changed = [damage(content, random.Random(seed)) for seed in range(50)]
    assert sum(data != content for data in changed) >= 48
