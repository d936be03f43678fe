"""Which gates the search finds, which way round their matrices are, how they are read."""

import re

import pytest
import torch
from moe_models import DIM, EXPERTS
from torch import Tensor, nn

from spectral_router import find_gates, wrap_moe

FIRST, SECOND = "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"


class Raw(nn.Module):
    """A block whose gate is a parameter of its own."""

    def __init__(self, name: str, rows: int, columns: int, experts: int) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(rows, columns)))
        self.experts = nn.ModuleList(nn.Linear(rows + columns - experts, 3) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.name)
        logits = x @ (weight if weight.shape[1] == len(self.experts) else weight.mT)
        return sum(p * expert(x) for p, expert in zip(logits.softmax(-1).split(1, -1), self.experts, strict=True))


@pytest.mark.parametrize(("experts", "dim"), [(4, 16), (16, 4), (8, 8)])
def test_linear_gate_is_read_by_its_rows(experts: int, dim: int) -> None:
    model = nn.Module()
    model.gate = nn.Linear(dim, experts)
    model.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))
    (gate,) = find_gates(model)
    assert (gate.num_experts, gate.dim, gate.transposed) == (experts, dim, False)
    assert torch.equal(gate.weight, model.gate.weight)


@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
@pytest.mark.parametrize(("experts", "dim"), [(4, 16), (16, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_raw_parameter_is_turned_by_the_number_of_experts(experts: int, dim: int, transposed: bool, named: bool) -> None:
    rows, columns = (dim, experts) if transposed else (experts, dim)
    block = Raw("w_gate", rows, columns, experts)
    with wrap_moe(nn.Sequential(block), gates="w_gate" if named else None) as handle:
        (gate,) = handle.gates
        assert (gate.num_experts, gate.dim) == (experts, dim)
        assert torch.equal(gate.weight, block.w_gate.mT if transposed else block.w_gate)


@pytest.mark.parametrize(("name", "transposed"), [("gate_weight", False), ("w_gate", True)])
def test_square_raw_parameter_is_turned_by_the_habit_of_its_name(name: str, transposed: bool) -> None:
    block = Raw(name, 8, 8, 8)
    (gate,) = find_gates(nn.Sequential(block))
    parameter = getattr(block, name)
    assert torch.equal(gate.weight, parameter.mT if transposed else parameter)


@pytest.mark.parametrize("gates", [None, "w_gate", "0.w_gate", re.compile(r".*w_gate")])
def test_probabilities_of_a_raw_parameter_are_those_that_route(gates: object) -> None:
    block, seen = Raw("w_gate", DIM, EXPERTS, EXPERTS), []
    handle = wrap_moe(nn.Sequential(block), gates=gates, penalty=None, balance=lambda p, _: seen.append(p) or p.sum())
    x = torch.randn(5, DIM)
    handle.model(x)
    torch.testing.assert_close(seen[0], (x @ block.w_gate).softmax(-1))


class Stacked(nn.Module):
    """Experts stacked into parameters of the block itself, no count of them anywhere."""

    def __init__(self, gate: str, matrix: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.randn(4, 16, 16))
        self.outward = nn.Parameter(torch.randn(4, 16, 16))
        setattr(self, gate, matrix)


@pytest.mark.parametrize(
    ("name", "matrix", "gates"),
    [
        ("gate", nn.Linear(16, 4), None),
        ("router", nn.Parameter(torch.randn(16, 4)), None),
        ("router", nn.Parameter(torch.randn(4, 16)), None),
        ("sel", nn.Parameter(torch.randn(16, 4)), "sel"),
        ("sel", nn.Parameter(torch.randn(4, 16)), "sel"),
    ],
)
def test_stacked_experts_of_the_block_tell_their_number(name: str, matrix: nn.Module | nn.Parameter, gates: str | None) -> None:
    with wrap_moe(nn.ModuleList([Stacked(name, matrix)]), gates=gates) as handle:
        assert [tuple(gate.weight.shape) for gate in handle.gates] == [(4, 16)]


def test_heads_of_attention_are_no_experts() -> None:
    class GatedAttention(Stacked):
        pass

    assert find_gates(nn.ModuleList([GatedAttention("gate", nn.Linear(16, 4))])) == []
    block = nn.Module()
    block.gate, block.relative_bias = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 5, 5))  # one stack says nothing
    assert find_gates(block) == []


def test_a_layer_is_matched_by_its_outputs_only() -> None:
    block = nn.Module()
    block.gate, block.experts = nn.Linear(4, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    assert find_gates(block) == []


def test_one_gate_in_two_blocks_is_one_gate() -> None:
    gate = nn.Linear(16, 4)
    model = nn.ModuleList([nn.ModuleDict({"gate": gate, "experts": nn.ModuleList([nn.Linear(16, 16)] * 4)}) for _ in range(2)])
    assert [found.name for found in find_gates(model)] == ["0.gate"]


def test_gates_in_a_dictionary_are_all_found() -> None:
    block = nn.Module()
    block.gates = nn.ModuleDict({task: nn.Linear(16, 4) for task in "ab"})
    block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    assert [gate.name for gate in find_gates(block)] == ["gates.a", "gates.b"]


def test_scoring_by_a_module_is_read_from_the_source_too() -> None:
    class SigmoidMoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.act = nn.Linear(16, 4), nn.Sigmoid()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    assert [gate.scoring for gate in find_gates(SigmoidMoE())] == ["sigmoid"]


def test_weights_that_fit_no_known_scoring_are_told() -> None:
    class RescaledRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 4
            self.weight = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (7 * x @ self.weight.T).softmax(-1).topk(2)

    model = nn.ModuleDict({"router": RescaledRouter(), "experts": nn.ModuleList(nn.Linear(16, 16) for _ in range(4))})
    (gate,) = find_gates(model)
    assert gate.assumed
    assert "scoring assumed" in repr(gate)


def test_a_gate_that_returns_something_else_in_training_is_named() -> None:
    class TwoFaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 4
            self.weight = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            logits = x @ self.weight.T
            return (logits, logits.sum()) if self.training else logits

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = TwoFaced()

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x)[0]

    wrap_moe(model := Mixture())
    with pytest.raises(RuntimeError, match=r"gate 'router' is read from output: logits, but returned a tuple here"):
        model(torch.randn(2, 16))


def test_a_named_module_with_several_matrices_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(4, 16))
            self.two = nn.Parameter(torch.randn(4, 16))

    with pytest.raises(ValueError, match=r"odd, which has 2 matrices.*name one of odd\.one \(4 x 16\), odd\.two \(4 x 16\)"):
        wrap_moe(nn.ModuleDict({"odd": Odd()}), gates="odd")
