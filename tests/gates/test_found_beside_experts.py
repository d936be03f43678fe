"""Gates that stand beside experts, under names and in shapes that real repositories have: found without an example."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_router import find_gates, wrap_moe


def experts() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(16, 16) for _ in range(4))


class TwoMatrices(nn.Module):
    """One scores; the other has its shape and is for logging only, or left over."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.randn(16, 4))
        if raw:
            self.w_gate_aux = nn.Parameter(torch.randn(16, 4))
        else:
            self.gate = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = (x @ self.w_gate).softmax(-1).topk(2)
        return indices, weights


@pytest.mark.parametrize("raw", [True, False])
def test_of_two_matrices_the_one_that_scores(raw: bool) -> None:
    model = nn.Module()
    model.gate, model.experts = TwoMatrices(raw), experts()
    (gate,) = find_gates(model)
    assert gate.matrix is model.gate.w_gate


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 16, 24)), nn.Parameter(torch.randn(4, 24, 16))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("router_DE", (16, 4)), ("expert_sel", (4, 16)), ("router1", (16, 4)), ("weight", (16, 4)), ("sel", (4, 16))],
)
def test_a_raw_parameter_of_any_name(name: str, shape: tuple[int, int]) -> None:
    block = nn.Module()
    block.num_experts, block.top_k, block.experts = 4, 2, Stacked()
    block.register_parameter(name, nn.Parameter(torch.randn(shape)))
    (gate,) = find_gates(nn.Sequential(block))
    assert gate.matrix is getattr(block, name)
    assert gate.weight.shape == (4, 16)


def lin() -> nn.Linear:
    return nn.Linear(16, 4)


def soft() -> nn.Sequential:
    return nn.Sequential(lin(), nn.Softmax(-1))


MODULES = {
    "f_gate": lin,
    "gate_fc": lin,
    "gate_dnn_final_layer": lambda: nn.ModuleList([lin(), lin()]),
    "task_gates": lambda: nn.ModuleList(nn.ModuleList([soft(), soft()]) for _ in range(2)),
    "share_gates": lambda: nn.ModuleList([soft()]),
    "gates_specific": lambda: nn.ModuleList([soft(), soft()]),
    "gate_shared": soft,
    "lora_gate": lambda: nn.ModuleDict({"default": lin()}),
    "selection_network": lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), lin()),
    "classifier_gate": lin,
    "gating_fc": lin,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_any_name_and_nesting(name: str) -> None:
    block = nn.Module()
    block.num_experts, block.experts = 4, experts()
    block.add_module(name, MODULES[name]())
    wanted = [m.weight for m in getattr(block, name).modules() if isinstance(m, nn.Linear) and m.out_features == 4]
    found = find_gates(nn.Sequential(block))
    assert {id(gate.matrix) for gate in found} == {id(weight) for weight in wanted}
    assert len(found) == len(wanted)


class TwiceAsMany(nn.Module):
    """Logits and the widths of noise in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.f_gate = nn.Linear(16, 8, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        clean, width = self.f_gate(x).chunk(2, -1)
        p = (clean + torch.randn_like(clean) * F.softplus(width)).softmax(-1)
        return sum(p[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


def test_two_rows_an_expert_are_no_more_experts() -> None:
    (gate,) = wrap_moe(TwiceAsMany(), gates="f_gate").gates
    assert gate.num_experts == 4
    assert gate.weight.shape == (4, 16)


class OwnMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4))
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        probs = (x @ self.weight).softmax(-1)
        return x + sum(probs[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class ExpertBlock(OwnMatrix):
    pass


@pytest.mark.parametrize("kind", [OwnMatrix, ExpertBlock])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_class_of_a_block_names_the_matrix_that_it_owns(kind: type[nn.Module], layers: int) -> None:
    model = nn.Sequential(*(kind() for _ in range(layers)))
    assert [gate.matrix for gate in wrap_moe(model, gates=kind).gates] == [block.weight for block in model]
