"""Which gates `gates=` and `exclude=` mean, and which way round their matrices are read."""

import re

import pytest
import torch
from moe_models import DIM, EXPERTS, Block, Stack, mixtral, mixtral_gates
from torch import Tensor, nn

from spectral_router import Gate, find_gates, wrap_moe

FIRST, SECOND = "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"


def names(model: nn.Module, **options) -> list[str]:
    with wrap_moe(model, **options) as handle:
        return [gate.name for gate in handle.gates]


def only_the_second(name: str, module: nn.Module) -> bool:
    return name.endswith("gate") and ".1." in name and hasattr(module, "weight")


# -------------------------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (None, [FIRST, SECOND]),
        ("gate", [FIRST, SECOND]),
        ("mlp.gate", [FIRST, SECOND]),
        ("layers.1.mlp.gate", [SECOND]),
        (FIRST, [FIRST]),
        (r"model\.layers\.[1-9]\.mlp\.gate", [SECOND]),
        (r".*\.gate", [FIRST, SECOND]),
        (re.compile(r".*0\.mlp\.gate"), [FIRST]),
        ("model.layers.1", [SECOND]),  # what is above a gate
        (f"{FIRST}.weight", [FIRST]),  # the parameter's path
        (type(mixtral_gates(mixtral())[0]), [FIRST, SECOND]),
        (only_the_second, [SECOND]),
        ([SECOND, FIRST], [SECOND, FIRST]),
        ([only_the_second, "mlp.gate", re.compile(FIRST)], [SECOND, FIRST]),
        ((name for name in (SECOND, FIRST)), [SECOND, FIRST]),
        ([[FIRST], (SECOND,)], [FIRST, SECOND]),
    ],
)
def test_gates(gates: object, expected: list[str]) -> None:
    assert names(mixtral(), gates=gates) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("layers.0.mlp.gate", [SECOND]),
        (r"model\.layers\.1\..*", [FIRST]),
        (re.compile(r".*\.1\..*"), [FIRST]),
        (only_the_second, [FIRST]),
        (["layers.0.mlp.gate"], [SECOND]),
    ],
)
def test_exclude(exclude: object, expected: list[str]) -> None:
    assert names(mixtral(), exclude=exclude) == expected


def test_gates_and_exclude_as_gate_objects() -> None:
    model = mixtral()
    first, second = find_gates(model)
    own = Gate("mine", mixtral_gates(model)[1], 8, position=0)
    assert names(model, gates=first) == [FIRST]
    assert names(model, gates=[own, FIRST]) == ["mine", FIRST]
    assert names(model, gates=[first, second], exclude=first) == [SECOND]
    with wrap_moe(model, gates=own) as handle:
        assert handle.gates == [own]


def test_gate_named_in_two_ways_is_one_gate() -> None:
    assert names(mixtral(), gates=["gate", FIRST, re.compile(".*"), only_the_second])[:2] == [FIRST, SECOND]
    assert names(mixtral(), gates=["gate", FIRST, f"{FIRST}.weight"]) == [FIRST, SECOND]


class Sigmoid(nn.Module):
    """Scores each expert by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.sigmoid(self.gate(x)).split(1, -1)
        return sum(share * expert(x) for share, expert in zip(shares, self.experts, strict=True))


@pytest.mark.parametrize("gates", [None, "0.gate", "0.gate.weight", re.compile(r"0\.gate\.weight")])
def test_reading_does_not_depend_on_how_a_gate_is_named(gates: object) -> None:
    with wrap_moe(nn.Sequential(Sigmoid()), gates=gates) as handle:
        (gate,) = handle.gates
    assert repr(gate) == "Gate('0.gate', 4 experts x 16, sigmoid, output: logits)"


class SigmoidOfBlock(Block):
    """Its base, which it does not follow in this, has a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.sigmoid(self.gate(x)).split(1, -1)
        return sum(share * expert(x) for share, expert in zip(shares, self.experts, strict=True))


def test_scoring_is_that_of_the_forward_that_runs() -> None:
    assert [gate.scoring for gate in find_gates(Stack(Block(), SigmoidOfBlock()))] == ["softmax", "sigmoid"]


def test_names_reach_what_the_search_does_not_find() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, EXPERTS))
    assert find_gates(model) == []
    with wrap_moe(model, gates="1") as handle:
        assert [(gate.name, gate.num_experts, gate.dim) for gate in handle.gates] == [("1", EXPERTS, DIM)]


# ------------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("gates", ["mlp.gat", "lp.gate", r".*\.gates", re.compile("mlp.gat"), ["mlp.gate", "mlp.gat"]])
def test_no_match_lists_near_misses(gates: object) -> None:
    with pytest.raises(ValueError, match=r"gates=.*gat.*matches no .* in MixtralForCausalLM.*nearest: .*mlp\.gate"):
        wrap_moe(mixtral(), gates=gates)


def test_predicate_or_class_that_matches_nothing() -> None:
    for gates in (lambda name, module: False, nn.Conv2d):
        with pytest.raises(ValueError, match="matches no"):
            wrap_moe(mixtral(), gates=gates)


def test_exclude_that_matches_nothing_names_the_gates() -> None:
    with pytest.raises(ValueError, match=re.escape(f"exclude='nothing' matches none of the gates: {FIRST}, {SECOND}")):
        wrap_moe(mixtral(), exclude="nothing")


def test_no_gate_in_the_model() -> None:
    with pytest.raises(ValueError, match=r"no router gate found in Sequential.*name the gates with gates="):
        wrap_moe(nn.Sequential(nn.Linear(4, 4)))


def test_gate_like_modules_are_hinted_at() -> None:
    model = nn.Module()
    model.router = nn.Sequential(nn.Linear(DIM, 3))
    with pytest.raises(ValueError, match=r"no router gate found in Module \(nearest: router\)"):
        wrap_moe(model)


@pytest.mark.parametrize("options", [{"gates": []}, {"exclude": "gate"}])
def test_nothing_left(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="gate"):
        wrap_moe(mixtral(), **options)


def test_failed_wrapping_leaves_no_hook() -> None:
    model = mixtral()
    with pytest.raises(ValueError, match="matches no"):
        wrap_moe(model, gates=["mlp.gate", "nothing"])
    wrap_moe(model)


@pytest.mark.parametrize("option", ["gates", "exclude"])
def test_regular_expression_that_is_none(option: str) -> None:
    with pytest.raises(ValueError, match=r"valid regular expression, got '\(gate'"):
        wrap_moe(mixtral(), **{option: "(gate"})


@pytest.mark.parametrize("option", ["gates", "exclude"])
@pytest.mark.parametrize("value", [3, [FIRST, 3]])
def test_selector_of_the_wrong_kind(option: str, value: object) -> None:
    with pytest.raises(TypeError, match=r"take names, patterns, module classes, predicates or Gate objects, got 3"):
        wrap_moe(mixtral(), **{option: value})


def test_gate_of_another_model() -> None:
    (gate, _) = find_gates(mixtral())
    with pytest.raises(ValueError, match="is not a part of MixtralForCausalLM"):
        wrap_moe(mixtral(), gates=gate)


@pytest.mark.parametrize(("name", "value"), [("scoring", "sofmax"), ("reads", "output")])
def test_gate_checks_its_arguments(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* got {name}='{value}'"):
        Gate("gate", nn.Linear(DIM, EXPERTS), EXPERTS, **{name: value})


# --------------------------------------------------------------------------------------------------------- orientation


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

    with pytest.raises(ValueError, match="matches no parameter, and no module with one matrix"):
        wrap_moe(nn.ModuleDict({"odd": Odd()}), gates="odd")
