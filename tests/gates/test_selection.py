"""Which gates `gates=` and `exclude=` mean."""

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


def test_no_gate_in_the_model_and_nothing_like_one() -> None:
    """A pipeline stage of dense layers: told, and the loop goes on."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(
        UserWarning, match=r"no router gate in Sequential, so nothing is added; if it has one, name it with gates="
    ):
        handle = wrap_moe(model)
    model(torch.randn(2, 4)).sum().backward()
    assert handle.loss() == 0
    assert handle.metrics() == {}
    assert handle.state_dict()["gates"] == {}


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
