"""`compare_checkpoints` against literal formulas, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from report_checkpoints import weights
from safetensors.torch import save_file

from spectral_router import compare_checkpoints
from spectral_router.report.comparison import GateDrift

KEY = "layers.1.mlp.gate.weight"


def compared(change, tmp_path: Path, **options) -> GateDrift:
    """The drift of the gate of layer 1 after `change` of its matrix; the other layers have not moved."""
    old, new = weights(**options), weights(**options)
    new[KEY] = change(new[KEY].clone())
    save_file(old, tmp_path / "a.safetensors")
    torch.save(new, tmp_path / "b.pt")  # in another format
    comparison = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert [gate.change == 0 for gate in comparison.gates] == [True, torch.equal(old[KEY], new[KEY]), True]
    assert comparison.gates[0].pruning == []
    assert comparison.gates[0].certified_share == 1
    json.dumps(comparison.to_dict())
    return comparison.gates[1]


def test_drift_is_that_of_the_formulas(tmp_path: Path) -> None:
    noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    old = weights()[KEY].double()
    gate = compared(lambda w: 1.1 * w + 0.3 * noise, tmp_path)
    new = (1.1 * weights()[KEY] + 0.3 * noise).double()
    assert gate.change == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-6)
    assert gate.row_cosines.tolist() == pytest.approx(
        [torch.dot(a, b).item() / (a.norm() * b.norm()).item() for a, b in zip(old, new, strict=True)]
    )
    bases = [torch.linalg.qr(w.mT)[0] for w in (old, new)]
    angles = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).acos().flip(0)
    assert gate.angles.tolist() == pytest.approx(angles.tolist(), abs=1e-5)
    assert gate.moved.tolist() == pytest.approx((new - old).norm(dim=1).tolist(), rel=1e-5)
    assert gate.norm_change.tolist() == pytest.approx((new.norm(dim=1) - old.norm(dim=1)).tolist(), abs=1e-5)


def test_small_angles_are_no_rounding(tmp_path: Path) -> None:
    def turned(weight):
        weight = torch.zeros_like(weight)
        weight[torch.arange(8), torch.arange(8)] = 1
        weight[0, 20] = 1e-5
        return weight

    straight = compared(lambda w: w, tmp_path)
    assert straight.angles.abs().max() < 1e-6
    old = weights()
    new = weights()
    old[KEY], new[KEY] = torch.eye(8, 32), turned(new[KEY])
    save_file(old, tmp_path / "a.safetensors")
    save_file(new, tmp_path / "b.safetensors")
    gate = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").gates[1]
    assert gate.angles[0].item() == pytest.approx(1e-5, rel=1e-3)


def test_experts_that_swapped_are_named(tmp_path: Path) -> None:
    order = [0, 5, 2, 3, 4, 1, 7, 6]
    gate = compared(lambda w: w[order] + 0.01, tmp_path)
    assert gate.swapped == [(1, 5), (6, 7)]
    assert gate.taken == [(1, 5), (5, 1), (6, 7), (7, 6)]
    assert gate.certified_share == 0.5


def test_the_row_whose_length_changed_least_is_a_candidate(tmp_path: Path) -> None:
    growth = torch.tensor([1.2, 1.3, 1.25, 1.001, 1.2, 1.3, 1.2, 1.3])[:, None]
    gate = compared(lambda w: w * growth, tmp_path)
    assert [expert for expert, _ in gate.pruning] == [3]
    assert gate.pruning[0][1].startswith("its row's length changed by 0.10%, ")
    assert compared(lambda w: w * 1.2, tmp_path).pruning == []  # all alike


def test_gates_that_broke_are_compared_all_the_same(tmp_path: Path) -> None:
    gate = compared(lambda w: w.index_fill_(0, torch.tensor([0]), torch.nan), tmp_path)
    assert gate.after.verdict == "broken"
    assert gate.certified_share == pytest.approx(7 / 8)


def test_different_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_file(weights(), tmp_path / "a" / "model.safetensors")
    save_file(weights(layers=2), tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match=r"are different models: 3 gates and 2, and only one has 'layers.2.mlp.gate'"):
        compare_checkpoints(tmp_path / "a", tmp_path / "b")
    save_file(weights(experts=4), tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match=r"gate 'layers.0.mlp.gate' is 8 x 32 in one, 4 x 32 in the other"):
        compare_checkpoints(tmp_path / "a", tmp_path / "b")
    save_file(weights(), tmp_path / "b" / "model.safetensors")
    for name, kind in (("a", "one"), ("b", "two")):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=r"are different models: one and two"):
        compare_checkpoints(tmp_path / "a", tmp_path / "b")


def test_the_same_model_under_other_names_is_compared(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights().items()}, tmp_path / "b.safetensors")
    gates = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").gates
    assert [gate.change for gate in gates] == [0, 0, 0]
