"""Deltas: only what changed, applied and removed to the bit."""

import copy

import pytest
import torch
from moe_models import BATCH, mixtral
from surgical_checks import OPTIMIZERS, bits, may_change, steps

from spectral_router import load_delta, surgical, wrap_moe
from studies.gates import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
safetensors = pytest.importorskip("safetensors")


def adapted(model, batch, task, **options):
    """The path of an update that has been made, and what the model was before."""
    before = bits(model)
    with surgical(model, batch, top=1, **options) as path:
        steps(lambda: task(model(**batch)), OPTIMIZERS["adamw"](model.parameters()), 2)
    return path, before


def same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch_transformers", "dbrx", "doge", "flat_columns"])
def test_applying_and_removing_is_exact(name: str, tmp_path) -> None:
    (case,) = [case for case in CASES if case.name == name]
    model, inputs = case.build()
    fresh = copy.deepcopy(model)
    path, before = adapted(model, inputs, lambda output: next(iter(output.values())).float().square().mean())
    count = path.save_delta(tmp_path / "delta.safetensors")
    after = bits(model)
    masks = may_change(model, path)
    assert 0 < count <= sum(int(mask.sum()) for mask in masks.values())
    with load_delta(fresh, tmp_path / "delta.safetensors") as delta:
        assert same(fresh, after)
        assert delta.numel == count
        assert delta.path["experts"] == {layer.gate: list(layer.experts) for layer in path.layers}
    assert same(fresh, before)
    delta.remove()
    assert same(fresh, before)


def test_bfloat16_and_a_handle(tmp_path) -> None:
    model = mixtral().bfloat16()
    fresh = copy.deepcopy(model)
    path, before = adapted(model, BATCH, lambda output: output.loss)
    path.save_delta(tmp_path / "delta.safetensors")
    with wrap_moe(fresh) as handle:
        delta = load_delta(handle, tmp_path / "delta.safetensors")
        assert same(fresh, bits(model))
        delta.remove()
    assert same(fresh, before)


def test_the_file_holds_what_changed_and_nothing_else(tmp_path) -> None:
    model = mixtral()
    path, before = adapted(model, BATCH, lambda output: output.loss, also="norm")
    with torch.no_grad():  # one slice is as it was: it is not in the file
        first = path.entries[0]
        first.part.tensor.copy_(before[first.name][first.part.index])
    path.save_delta(tmp_path / "delta.safetensors")
    with safetensors.safe_open(tmp_path / "delta.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == {entry.key for entry in path.entries[1:]}
    assert first.key == f"{first.name}[{first.part.index[0].start}:{first.part.index[0].stop}]"


def test_other_models_are_refused(tmp_path) -> None:
    model = mixtral()
    fresh, file = copy.deepcopy(model), tmp_path / "delta.safetensors"
    path, _ = adapted(model, BATCH, lambda output: output.loss)
    path.save_delta(file)
    with pytest.raises(ValueError, match=r"was made from other values of .* than the model has; .* strict=False"):
        load_delta(model, file)
    entry = path.entries[0]
    with torch.no_grad():
        fresh.get_parameter(entry.name)[entry.part.index].mul_(2)
    state = bits(fresh)
    with pytest.raises(ValueError, match="was made from other values"):
        load_delta(fresh, file)
    assert same(fresh, state)
    with load_delta(fresh, file, strict=False):
        assert same(fresh, bits(model))
    assert same(fresh, state)
    with pytest.raises(ValueError, match=r"is of another model: this one has no parameter model\.layers"):
        load_delta(torch.nn.Linear(2, 2), file)
    with pytest.raises(
        ValueError, match=r"is of another model: .* is \(1, 64, 16\) float32 here and \(1, 48, 16\) float32 there"
    ):
        load_delta(mixtral(intermediate_size=32), file)
    with pytest.raises(
        ValueError, match=r"float64 here and .* float32 there; load it into a model of the same architecture and dtype"
    ):
        load_delta(mixtral().double(), file)
    file.write_text("nothing")
    with pytest.raises(ValueError, match=r"is no delta as ExpertPath\.save_delta writes it"):
        load_delta(model, file)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"is no delta as ExpertPath\.save_delta writes it: its format is None"):
        load_delta(model, file)


def test_a_delta_under_later_changes_is_not_removed(tmp_path) -> None:
    model = mixtral()
    fresh, file = copy.deepcopy(model), tmp_path / "delta.safetensors"
    path, _ = adapted(model, BATCH, lambda output: output.loss)
    path.save_delta(file)
    delta = load_delta(fresh, file)
    with torch.no_grad():
        fresh.get_parameter(path.entries[0].name).add_(1)
    with pytest.raises(RuntimeError, match="cannot be removed: what it changed has been changed again since"):
        delta.remove()


def test_a_path_without_a_model_has_no_delta(tmp_path) -> None:
    path = surgical(mixtral(), BATCH, top=1).path
    with pytest.raises(RuntimeError, match="the path has not been in use, so nothing can have changed"):
        path.save_delta(tmp_path / "delta.safetensors")
