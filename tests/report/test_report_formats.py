"""One model in every format: the same gates, and no code of a file is run."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from report_checkpoints import EXPERTS, gates_of, save_sharded, weights
from safetensors.torch import save_file

from spectral_router import inspect_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's own, of a save without processes


def save_nested(tensors, folder: Path) -> Path:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(8, 32)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": tensors, "optimizer": optimizer, "step": 7}, folder / "step.pt")
    return folder / "step.pt"


def save_plain(tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def save_old(tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def save_safetensors(tensors, folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_dcp(tensors, folder: Path) -> Path:
    dcp.save({"model": tensors, "step": 3}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def save_gguf(tensors, folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3moe")
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("layers.").partition(".")
        names = {
            "mlp.gate.weight": f"blk.{block}.ffn_gate_inp.weight",
            "mlp.gate.e_score_correction_bias": f"blk.{block}.exp_probs_b.bias",
            "mlp.experts.up_proj": f"blk.{block}.ffn_up_exps.weight",
            "mlp.experts.gate_proj.weight": f"blk.{block}.ffn_gate_exps.weight",
            "mlp.shared_expert_gate.weight": f"blk.{block}.ffn_gate_inp_shexp.weight",
        }
        writer.add_tensor(names.get(rest, name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


SAVERS = [
    save_safetensors,
    lambda tensors, folder: save_sharded(tensors, folder),
    lambda tensors, folder: save_sharded(tensors, folder, "bin", 3),
    lambda tensors, folder: save_sharded(tensors, folder) / "model.safetensors.index.json",
    save_plain,
    save_old,
    save_nested,
    save_dcp,
    save_gguf,
]
NAMES = ["safetensors", "sharded", "sharded_bin", "index", "plain", "old", "nested", "dcp", "gguf"]


@pytest.mark.parametrize("save", SAVERS, ids=NAMES)
def test_every_format_gives_the_same_gates(save, tmp_path: Path) -> None:
    tensors = weights(layers=11)  # 10 sorts behind 9
    report = inspect_checkpoint(save(tensors, tmp_path))
    assert [gate.layer for gate in report.gates] == list(range(11))
    for gate, weight in zip(report.gates, gates_of(tensors).values(), strict=True):
        assert torch.equal(gate.weight, weight)
        bias = tensors[f"layers.{gate.layer}.mlp.gate.e_score_correction_bias"]
        assert gate.bias_spread == pytest.approx((bias.max() - bias.min()).item())


def test_a_distributed_checkpoint_in_pieces_is_put_together(tmp_path: Path) -> None:
    """As ranks write it: the table says which part of a tensor lies where."""
    tensors = weights()
    folder = save_dcp(tensors, tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = "model.layers.1.mlp.gate.weight"
    (index,) = [index for index in metadata.storage_data if index.fqn == name]
    info = metadata.storage_data.pop(index)
    entry = metadata.state_dict_metadata[name]
    chunk = entry.chunks.pop()
    for number, rows in enumerate((slice(0, 5), slice(5, 8))):
        file = folder / f"__{number + 1}_0.distcp"
        torch.save(tensors["layers.1.mlp.gate.weight"][rows].clone(), file)
        offsets, sizes = torch.Size([rows.start, 0]), torch.Size([rows.stop - rows.start, 32])
        entry.chunks.append(type(chunk)(offsets=offsets, sizes=sizes))
        place = type(index)(fqn=name, offset=offsets, index=number)
        metadata.storage_data[place] = type(info)(relative_path=file.name, offset=0, length=file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    report = inspect_checkpoint(folder)
    assert torch.equal(report.gates[1].weight, tensors["layers.1.mlp.gate.weight"])
    (folder / "__2_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(there is no file __2_0.distcp\); save the checkpoint again"):
        inspect_checkpoint(folder)


class Evil:
    """Makes a file if anything unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"{sys.executable} -c \"open('{self.mark}', 'w')\"",)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"layers.0.gate.weight": Evil(mark)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors, and no code of a file is run here"):
        inspect_checkpoint(tmp_path / "evil.pt")
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match=r"asks for posix.system, which is not made here"):
        inspect_checkpoint(folder)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the file is evil indeed
    assert mark.exists()


def test_code_that_a_config_names_is_not_run(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    mark = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Evil"], "model_type": "evil", "auto_map": auto}))
    report = inspect_checkpoint(tmp_path)
    assert len(report.gates) == 3
    assert "Evil could not be built" in report.notes[0]
    assert not mark.exists()


def test_a_name_is_looked_up_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--mixture"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    (model / "snapshots" / "abc123").mkdir(parents=True)
    save_file(weights(), model / "snapshots" / "abc123" / "model.safetensors")
    assert len(inspect_checkpoint("someone/mixture").gates) == 3
    with pytest.raises(ValueError, match=r"no someone/other, neither here nor in the cache of the hub .*nothing is downloaded"):
        inspect_checkpoint("someone/other")


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
def test_fp8_gates_are_dequantised_by_their_blocks(suffix: str, tmp_path: Path) -> None:
    tensors = weights(dim=384, layers=1)
    gate = tensors["layers.0.mlp.gate.weight"]
    scale = torch.tensor([[0.5, 2.0, 4.0]])
    expected = (gate / scale.repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
    tensors["layers.0.mlp.gate.weight"] = expected
    tensors[f"layers.0.mlp.gate.{suffix}"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = inspect_checkpoint(tmp_path).gates
    assert torch.equal(found.weight, expected.float() * scale.repeat_interleave(128, 1))
    assert found.notes == ["dequantised from F8_E4M3"]


def test_int8_gates_need_their_scales_and_4_bit_ones_are_named(tmp_path: Path) -> None:
    tensors = weights(layers=1)
    key = "layers.0.mlp.gate.weight"
    scales = tensors[key].abs().amax(-1)
    tensors[key] = (tensors[key] / scales[:, None] * 127).round().to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is int8 without scales; give the checkpoint from before the quantisation"):
        inspect_checkpoint(tmp_path)
    save_file({**tensors, "layers.0.mlp.gate.SCB": scales}, tmp_path / "model.safetensors")
    (found,) = inspect_checkpoint(tmp_path).gates
    assert torch.allclose(found.weight, weights(layers=1)[key], atol=0.02)
    packed = {**tensors, f"{key}.absmax": scales, key: torch.zeros(128, 1, dtype=torch.uint8)}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"packed in 4 bits by bitsandbytes, which is not read here"):
        inspect_checkpoint(tmp_path)
