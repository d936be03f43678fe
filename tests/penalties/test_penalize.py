"""penalize: which layers it chooses, and as what matrices."""

import copy
import re
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import parametrizations

from spectral_router import SpectralNormPenalty, SpectralRankPenalty, penalize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(2))
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 5, bias=False)


def shapes(weights: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in weights]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, ["stem", "blocks.0.fc", "blocks.0.out", "blocks.1.fc", "blocks.1.out", "head"]),
        (nn.Conv2d, ["stem"]),
        ((nn.Embedding, nn.Conv2d), ["stem", "table"]),
        ("head", ["head"]),
        ("fc", ["blocks.0.fc", "blocks.1.fc"]),
        ("1.fc", ["blocks.1.fc"]),
        ("blocks.0.out", ["blocks.0.out"]),
        (r"blocks\..*", ["blocks.0.fc", "blocks.0.out", "blocks.1.fc", "blocks.1.out"]),
        (re.compile(r".*[14]\.fc"), ["blocks.1.fc"]),
        (["head", "stem"], ["stem", "head"]),  # in the order of the model
        (["fc", "blocks.0.fc", nn.Linear], ["blocks.0.fc", "blocks.0.out", "blocks.1.fc", "blocks.1.out", "head"]),
        (lambda name, module: name.endswith("out") and isinstance(module, nn.Linear), ["blocks.0.out", "blocks.1.out"]),
        (
            lambda name, module: True,  # whatever has a matrix
            ["stem", "blocks.0.fc", "blocks.0.out", "blocks.1.fc", "blocks.1.out", "table", "head"],
        ),
    ],
)
def test_penalize_chooses(modules: object, expected: list[str]) -> None:
    model, given = Net(), []

    def penalty(weights: list[Tensor]) -> Tensor:
        given.extend(weights)
        return sum(weight.sum() for weight in weights)

    value = penalize(model, penalty, modules)
    matrices = [model.get_submodule(name).weight.flatten(1) for name in expected]
    assert shapes(given) == shapes(matrices)
    assert all(torch.equal(a, b) for a, b in zip(given, matrices, strict=True))
    value.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {f"{name}.weight" for name in expected}


@pytest.mark.parametrize("penalty", [SpectralNormPenalty(), SpectralRankPenalty(), SpectralRankPenalty("initial")])
def test_penalize_takes_any_penalty_and_is_the_same_on_every_call(penalty: nn.Module) -> None:
    model, twin = Net(), copy.deepcopy(penalty)
    flat = [module.weight.flatten(1) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for _ in range(3):
        torch.testing.assert_close(penalize(model, penalty), twin(flat), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (8, 6)), (nn.Conv2d, (8, 18)), (nn.Conv3d, (8, 54)), (nn.ConvTranspose2d, (8, 36))]
)
def test_penalize_puts_outputs_in_rows(kind: type[nn.Module], shape: tuple[int, int]) -> None:
    groups = 1 if kind is nn.ConvTranspose2d else 2
    model = nn.Sequential(kind(4, 8, 3, groups=groups, bias=False))
    assert penalize(model, shapes) == [shape]


def test_penalize_reads_a_grouped_transposed_convolution_by_output() -> None:
    layer = nn.ConvTranspose1d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(12.0).view(4, 3, 1))
    (matrix,) = penalize(layer, lambda weights: weights)
    # at kernel size one a row is what its output makes of the inputs of its group
    inputs = torch.randn(1, 4, 1)
    per_group = inputs.view(2, 2).repeat_interleave(3, 0)
    torch.testing.assert_close((matrix * per_group).sum(1), layer(inputs).view(6))


def test_penalize_counts_shared_layers_and_weights_once() -> None:
    layer = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    expected = SpectralNormPenalty(solver="exact")([layer.weight])
    model = nn.Sequential(layer, nn.Sequential(layer, tied))
    torch.testing.assert_close(penalize(model, SpectralNormPenalty(solver="exact")), expected)
    torch.testing.assert_close(penalize(model, SpectralNormPenalty(solver="exact"), ["0", "1.1"]), expected)


def test_penalize_reads_the_computed_weight_of_a_parametrised_layer() -> None:
    layer = parametrizations.weight_norm(nn.Linear(6, 3))
    penalty = SpectralNormPenalty(solver="exact")
    value = penalize(nn.Sequential(layer, nn.Linear(3, 2)), penalty, "0")
    torch.testing.assert_close(value.double(), reference.spectral_norm_penalty([layer.weight.detach()]), rtol=1e-5, atol=1e-5)
    value.backward()
    parts = layer.parametrizations.weight
    assert parts.original0.grad.abs().sum() > 0
    assert parts.original1.grad.isfinite().all()
    everything = penalize(nn.Sequential(layer), penalty, lambda name, module: True)  # its parts are no layers
    torch.testing.assert_close(everything, value)


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_penalize_gathers_sharded_weights(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        expected = reference.spectral_norm_penalty([layer.weight.detach() for layer in model])
        for layer in model:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        value = penalize(model, SpectralNormPenalty(solver="exact"))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        value.backward()
        assert isinstance(model[0].weight.grad, DTensor)
    finally:
        dist.destroy_process_group()


def test_message_penalize() -> None:
    model = Net()
    penalty = SpectralNormPenalty()
    hint = r"\(it has stem, blocks\.0\.fc, blocks\.0\.out, blocks\.1\.fc, blocks\.1\.out, for example\)"
    with pytest.raises(ValueError, match=f"modules='fcc' matches no module with a matrix as its weight in Net {hint}"):
        penalize(model, penalty, ["fc", "fcc"])
    for nothing in ("norm", nn.Bilinear, [], lambda name, module: False):
        with pytest.raises(ValueError, match="matches no module with a matrix as its weight in Net"):
            penalize(model, penalty, nothing)
    with pytest.raises(ValueError, match=r"no Linear or convolution found in ReLU; choose what to penalise with modules="):
        penalize(nn.ReLU(), penalty)
    with pytest.raises(ValueError, match=r"modules='x' matches no module with a matrix as its weight in ReLU$"):
        penalize(nn.ReLU(), penalty, "x")
    with pytest.raises(ValueError, match=r"modules takes a name, a suffix or a valid regular expression, got '\(fc'"):
        penalize(model, penalty, "(fc")
    with pytest.raises(TypeError, match="modules takes names, patterns, module classes, predicates or several of these, got 3"):
        penalize(model, penalty, 3)
    with pytest.raises(TypeError, match=r"penalty must be a callable of a list of matrices, got 0\.1"):
        penalize(model, 0.1)
