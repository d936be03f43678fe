"""Gradients on several processes against the objective on the global batch, written out by hand, in one process.

Every check is one line in the CHECKS of a `distributed_*` module; those of one pair of processes run in one go.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_accelerate
import pytest
from distributed_worker import names, run

pytestmark = pytest.mark.slow

ENGINES = [
    "distributed_at_step",
    "distributed_controllers",
    "distributed_ddp",
    "distributed_fsdp",
    "distributed_hold",
    "distributed_tp",
]
# of rooms beside `wrap`; in the same two processes, as these take longer to start than to check
LOSSES, SURGERY = "distributed_losses", "distributed_surgical"

ZERO = ["distributed_deepspeed", "distributed_zero_refuses"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return run([*ENGINES, SURGERY, LOSSES], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return run(["distributed_fsdp_three"], tmp_path_factory.mktemp("three"), ranks=3)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return run(ZERO, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("name", [name for engine in ENGINES for name in names(engine)])
def test_two_processes(two: dict[str, float | str], name: str) -> None:
    assert isinstance(two[name], float), two[name]
    assert two[name] < 1e-10


@pytest.mark.parametrize("name", names(LOSSES))
def test_balance_losses_of_the_global_batch(two: dict[str, float | str], name: str) -> None:
    assert isinstance(two[name], float), two[name]
    assert two[name] < 1


@pytest.mark.parametrize("name", names(SURGERY))
def test_surgical_updates(two: dict[str, float | str], name: str) -> None:
    assert two[name] == 0.0, two[name]


@pytest.mark.parametrize("name", names("distributed_fsdp_three"))
def test_more_processes_than_experts(three: dict[str, float | str], name: str) -> None:
    assert isinstance(three[name], float), three[name]
    assert three[name] < 1e-10


@pytest.mark.parametrize("name", [name for module in ZERO for name in names(module)])
def test_deepspeed(request: pytest.FixtureRequest, name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:  # no test dependency; importing it here would change this process
        pytest.skip("needs deepspeed")
    error = request.getfixturevalue("zero")[name]
    assert isinstance(error, float), error
    assert error < 1e-5  # float32


def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    # `--cpu` alone starts one process; the script asks for the CPU itself
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += [distributed_accelerate.__file__, str(tmp_path / "report.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("processes") == 2
    assert report.keys() == {"before", "after"}
    assert max(report.values()) < 1e-10
