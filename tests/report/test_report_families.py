"""Every family of transformers, as `save_pretrained` leaves it: the same gates and numbers as of the live model."""

from pathlib import Path

import pytest
import torch

from spectral_router import Gate, find_gates, inspect_checkpoint
from spectral_router.functional import spectral_norm, stable_rank
from spectral_router.report.checkpoint import open_checkpoint
from spectral_router.report.find_stored import stored_gates
from studies.gates.cases import Case
from studies.gates.family_table import TRANSFORMERS

# of other people's modules
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
# what names and shapes alone cannot tell: rows that are keys of experts, and a row more than experts that is no expert's
NAMES_ARE_NOT_ENOUGH = {"doge", "inkling"}


def untied(gates: list[Gate]) -> list[Gate]:
    """Gates that share their matrix once."""
    firsts = {(id(gate.matrix), gate.index): gate for gate in reversed(gates)}
    return [gate for gate in gates if firsts[id(gate.matrix), gate.index] is gate]


def built(case: Case) -> torch.nn.Module:
    model, _ = case.build()
    if case.name == "inkling2":  # the tiny size leaves its head with more tokens than its vocabulary, which no file can hold
        model.config.unpadded_vocab_size = model.config.vocab_size
        model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    return model


@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.name)
def test_a_saved_family_gives_what_the_live_model_gives(case: Case, tmp_path: Path) -> None:
    model = built(case)
    live = untied(find_gates(model))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        report = inspect_checkpoint(tmp_path / folder)
        assert report.notes == []
        if case.name != "diffusion_gemma_tied":  # the file has the decoder's name of what is the encoder's too
            assert [gate.name for gate in report.gates] == [gate.name for gate in live]
        assert [gate.scoring for gate in report.gates] == [gate.scoring for gate in live]
        for stored, gate in zip(report.gates, live, strict=True):
            weight = gate.weight.detach()
            assert torch.equal(stored.weight, weight)
            assert stored.geometry is not None
            assert stored.geometry.spectral_norm == pytest.approx(spectral_norm(weight).item(), rel=1e-5)
            assert stored.geometry.stable_rank == pytest.approx(stable_rank(weight).item(), rel=1e-5)


@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.name)
def test_names_and_shapes_alone_find_the_same_gates(case: Case, tmp_path: Path) -> None:
    model = built(case)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.config = {}
    live = {tuple(gate.weight.flatten().tolist()) for gate in find_gates(model)}
    if case.name == "doge":
        with pytest.raises(ValueError, match=r"no router gate .*near misses.*router_gate.weight \(8, 32\)"):
            stored_gates(checkpoint)
        return
    gates, _ = stored_gates(checkpoint)
    if case.name in NAMES_ARE_NOT_ENOUGH:  # shown, never guessed silently
        assert {note for gate in gates for note in gate.notes} == {"9 rows beside 8 experts"}
        gates = [gate for gate in gates if setattr(gate, "weight", gate.weight[:8]) is None]
    assert {tuple(gate.weight.flatten().tolist()) for gate in gates} == live


def test_a_selection_bias_is_read_beside_its_gate(tmp_path: Path) -> None:
    (case,) = [case for case in TRANSFORMERS if case.name == "deepseek_v4"]  # where the file calls it gate.bias
    model = built(case)
    model.save_pretrained(tmp_path)
    gates, _ = stored_gates(open_checkpoint(tmp_path))
    biases = [gate.selection_bias for gate in gates]
    true = dict(model.named_buffers()) | dict(model.named_parameters())
    assert biases[-1] is not None
    assert torch.equal(biases[-1], true["model.layers.3.mlp.gate.e_score_correction_bias"])
