"""`examples.transformer_moe` on two processes with gloo, started by torchrun and by accelerate; sharded checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformer_worker
from moe_models import BATCH, mixtral
from pictures import without_pictures
from safetensors.torch import load_file
from transformer_worker import arguments, write_domains

from examples.transformer_moe.__main__ import main
from spectral_router import wrap_moe

pytestmark = pytest.mark.slow

LIMIT = 240
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--main_process_port=0"]


def launch(launcher: list[str], *words: str | Path) -> None:
    command = [sys.executable, "-m", *launcher, transformer_worker.__file__, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-5000:]


def runs(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["runs"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "data"
    write_domains(folder)
    return folder


@pytest.fixture(scope="module")
def one(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single process, each arm with the whole batch."""
    out = tmp_path_factory.mktemp("one")
    with without_pictures():
        assert main(arguments(text, out, "--arms", "own", "both")) == 0
    return out


def assert_the_same_curve(found: Path, expected: Path, arm: str, tolerance: float) -> None:
    assert json.loads((found / "results.json").read_text())["processes"] == 2
    for phase in ("train", "adapt"):
        mine, theirs = (runs(out)[arm][0][phase] for out in (found, expected))
        assert len(mine["curve"]) == {"train": 6, "adapt": 4}[phase]
        for name in ("curve", "history"):
            assert len(mine[name]) == len(theirs[name])
        for (step, loss), (step_alone, loss_alone) in zip(mine["curve"], theirs["curve"], strict=True):
            assert step == step_alone
            assert loss == pytest.approx(loss_alone, abs=tolerance)
        for row, alone in zip(mine["history"], theirs["history"], strict=True):
            assert row["loss"] == pytest.approx(alone["loss"], abs=tolerance)
    weights = [load_file(out / "models" / f"{arm}-seed0" / "model.safetensors") for out in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=10 * tolerance) for name in weights[0])


@pytest.fixture(scope="module")
def torchrun(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, which take longer to start than to do both: the example, then a sharded checkpoint."""
    out = tmp_path_factory.mktemp("torchrun")
    launch(TORCHRUN, "example+checkpoint", text, out, "--arms", "own", "both")
    return out


def test_ddp_with_torchrun_gives_the_curve_of_one_process(one: Path, torchrun: Path) -> None:
    assert_the_same_curve(torchrun, one, "both", 1e-5)
    # the model's own loss is of the half that a process has, as transformers computes it
    assert_the_same_curve(torchrun, one, "own", 1e-2)


def test_fsdp2_with_accelerate_stopped_twice_gives_the_curve_of_one_process(text: Path, one: Path, tmp_path: Path) -> None:
    launch(ACCELERATE, "example", text, tmp_path, "--arms", "both", "--fsdp", "--stopped")
    assert_the_same_curve(tmp_path, one, "both", 1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is what is meant
def test_a_sharded_checkpoint_with_the_handle_attached(torchrun: Path) -> None:
    """Saved by two processes, read by one."""
    expected = torch.load(torchrun / "plain.pt", weights_only=False)
    assert mixtral().state_dict().keys() == expected["model"].keys()
    model = mixtral()
    handle = wrap_moe(model)
    handle.metrics()  # so that the term has a state to be filled
    state = {"model": model.state_dict(), "routers": handle.state_dict()}
    dcp.load(state, checkpoint_id=torchrun / "dcp")
    model.load_state_dict(state["model"])
    handle.load_state_dict(state["routers"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected["model"][name]), name
    anchor = expected["routers"]["penalty"]["anchor"]
    assert torch.equal(handle.penalty.anchor, anchor)
    anew = wrap_moe(mixtral())
    anew.model.load_state_dict(expected["model"])
    anew.metrics()
    assert (anew.penalty.anchor - anchor).abs().max() > 1e-4  # else the state would not matter
    assert model(**BATCH).loss.isfinite()
