"""A checkpoint of 60 GB, sparse on the disk: only the gates' bytes are read, in seconds, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from report_checkpoints import save_sparse
from torch import Tensor

ROOT = Path(__file__).parents[2]
LAYERS, SHARDS = 24, 12
EXPERTS, DIM, INNER = 8, 4096, 14336
MEASURE = """
import json, resource, sys, time
import spectral_router
from spectral_router.report.inspection import inspect_checkpoint
def read():
    return int(open("/proc/self/io").readline().split()[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, used, start = read(), peak(), time.perf_counter()
report = inspect_checkpoint(sys.argv[1])
seconds, bytes_read = time.perf_counter() - start, read() - before
print(json.dumps({
    "seconds": seconds, "read": bytes_read, "grown": peak() - used,
    "sums": [gate.weight.double().sum().item() for gate in report.gates],
}))
"""


def mixtral_of_60_gb(folder: Path) -> list[Tensor]:
    """Named as Mixtral's own shards are; returns the gates."""
    generator = torch.Generator().manual_seed(0)
    gates, places, total = [], {}, 0
    for shard in range(SHARDS):
        shapes: dict[str, tuple[int, ...]] = {}
        filled = {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            block = f"model.layers.{layer}.block_sparse_moe"
            for expert in range(EXPERTS):
                shapes |= {f"{block}.experts.{expert}.w{part}.weight": (INNER, DIM) for part in (1, 3)}
                shapes[f"{block}.experts.{expert}.w2.weight"] = (DIM, INNER)
            shapes[f"{block}.gate.weight"] = (EXPERTS, DIM)
            filled[f"{block}.gate.weight"] = torch.randn(EXPERTS, DIM, generator=generator).bfloat16()
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_sparse(shapes, filled, folder / name)
        places |= dict.fromkeys(shapes, name)
        gates += list(filled.values())
        total += (folder / name).stat().st_size
    assert total > 60e9
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return gates


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the bytes that Linux says were read")
def test_60_gb_open_in_seconds_and_only_the_gates_are_read(tmp_path: Path) -> None:
    try:
        gates = mixtral_of_60_gb(tmp_path)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files ({error})")
    if os.stat(tmp_path / f"model-00001-of-{SHARDS:05}.safetensors").st_blocks * 512 > 10e6:
        pytest.skip("this file system has no sparse files")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)  # shown by -s
    assert told["sums"] == [gate.double().sum().item() for gate in gates]
    # the gates are 1.5 MB; the rest is headers, and what a file is read ahead by
    assert told["read"] < 2 * sum(gate.numel() * 2 for gate in gates) + 2_000_000
    assert told["grown"] < 100e6  # torch alone takes 250 to 530 MB
    assert told["seconds"] < 5
