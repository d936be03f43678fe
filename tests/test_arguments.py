"""Bad arguments of the library's calls: one sentence each, at the call and not somewhere below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spectral_router
from spectral_router import (
    Gate,
    ImportanceConstraint,
    LoadBalanceLoss,
    LossFreeBias,
    MoEHandle,
    PrototypeRouter,
    RouterZLoss,
    SpectralRankPenalty,
    functional,
    rescue_collapsed_,
    route,
    wrap_moe,
)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs = self.router(x).softmax(-1)
        return sum(p * expert(x) for p, expert in zip(probs.split(1, -1), self.experts, strict=True))


LINEAR = nn.Linear(16, 4)
GATES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (
        ValueError,
        r"num_experts must be at most the 4 rows of weight, 4 x 16, .*num_experts=7 for 'gate'",
        {"num_experts": 7},
    ),
    (ValueError, r"num_experts must be at most the 4 rows .*pass transposed=True", {"num_experts": 16}),
    (
        ValueError,
        r"num_experts must be at most the 16 columns .*got num_experts=17 for 'gate'$",
        {"num_experts": 17, "transposed": True},
    ),
    (ValueError, r"num_experts must be at most the 4 rows .*got num_experts=3", {"num_experts": 3, "heads": 2}),
    (TypeError, "num_experts must be a whole number, got num_experts='4'", {"num_experts": "4"}),
    (ValueError, "parameter must be the path of a tensor in Linear, got parameter='wieght'", {"parameter": "wieght"}),
    (ValueError, "parameter must be the path of a tensor in Linear, got parameter='a.weight'", {"parameter": "a.weight"}),
    (TypeError, "module must be the module of the gate 'gate', got NoneType", {"module": None}),
    (TypeError, "module must be the module of the gate 'gate', got Parameter", {"module": LINEAR.weight}),
]


@pytest.mark.parametrize(("error", "says", "changes"), GATES, ids=[says[:60] for _, says, _ in GATES])
def test_a_gate_that_its_matrix_cannot_be(error: type[Exception], says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        Gate(**({"name": "gate", "module": LINEAR, "num_experts": 4} | changes))


def test_a_gate_may_have_rows_that_are_for_something_else() -> None:
    assert Gate("gate", LINEAR, 3).weight.shape == (3, 16)
    assert Gate("gate", LINEAR, 16, transposed=True).weight.shape == (16, 4)


WRAPPING: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (
        TypeError,
        r"got the class SpectralRankPenalty; call it: penalty=Sp.*\(\)",
        {"penalty": SpectralRankPenalty},
    ),
    (
        TypeError,
        r"got the class LoadBalanceLoss; call it: balance=Load.*\(\)",
        {"balance": LoadBalanceLoss},
    ),
    (TypeError, "model must be a module, or a list of the modules that are its parts, got None", {"model": None}),
    (TypeError, "model must be a module, .* got 'name'", {"model": "name"}),
    (TypeError, "model must be a module, .* got 7", {"model": 7}),
    (TypeError, "model must be a module, .* got <class", {"model": MoE}),
    (TypeError, "model must be a module, .* got array", {"model": np.ones((2, 2))}),
    (TypeError, "penalty_coef must be a number, got penalty_coef='0.1'", {"penalty_coef": "0.1"}),
    (TypeError, "balance_coef must be a number, got balance_coef=None", {"balance_coef": None}),
    (TypeError, r"balance_coef must be a number, got balance_coef=tensor\(1.\)", {"balance_coef": torch.tensor(1.0)}),
    (ValueError, "penalty_coef must be a finite number of at least 0, got penalty_coef=-1", {"penalty_coef": -1}),
    (TypeError, "penalty must be a callable, .* got 3", {"penalty": 3}),
]


@pytest.mark.parametrize(("error", "says", "changes"), WRAPPING, ids=[says[-40:] for _, says, _ in WRAPPING])
def test_wrapping_with_bad_arguments(error: type[Exception], says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        wrap_moe(**({"model": MoE()} | changes))


def test_numpy_numbers_are_numbers() -> None:
    assert wrap_moe(MoE(), penalty_coef=np.float32(0.5), balance_coef=1).penalty_coef == 0.5


def test_a_handle_that_was_removed_says_so() -> None:
    model = MoE()
    handle = wrap_moe(model)
    model(torch.randn(8, 16))
    handle.remove()
    for call in (handle.loss, lambda: handle.attach(torch.optim.SGD(model.parameters(), lr=1.0))):
        with pytest.raises(RuntimeError, match=r"this handle was removed from its model; call wrap_moe\(model\) for another"):
            call()
    handle.remove()  # safe to call twice


STATES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("with gates, penalty and balance, got an empty one", lambda state: {}),
    ("with gates, penalty and balance, got NoneType", lambda state: None),
    ("with gates, penalty and balance, got list", lambda state: [state]),
    ("with gates, penalty and balance, got gates, penalty", lambda state: {k: v for k, v in state.items() if k != "balance"}),
    ("with gates, penalty and balance, got gates, penalty, balance", lambda state: state | {"penalty": None}),
    ("the state holds 'no.such', which is no tensor of a Sp", lambda state: state | {"penalty": {"no.such": torch.ones(1)}}),
    ("the state holds 'anchors', which is no tensor of a Sp", lambda state: state | {"penalty": {"anchors": 1.0}}),
]


@pytest.mark.parametrize(("says", "damage"), STATES, ids=[says for says, _ in STATES])
def test_a_state_that_no_handle_gave(says: str, damage: Callable[[dict[str, Any]], Any]) -> None:
    handle: MoEHandle = wrap_moe(MoE())
    with pytest.raises(ValueError, match=says):
        handle.load_state_dict(damage(handle.state_dict()))
    handle.load_state_dict(handle.state_dict())


def arrays() -> dict[str, Callable[[], object]]:
    """Every public call that takes a tensor, on a numpy array in its place."""
    matrix = np.ones((4, 16), np.float32)
    weight, tokens = torch.randn(4, 16), torch.randn(8, 16)
    two = {"importance_kl_loss", "load_balance_loss", "mutual_information_loss", "router_z_loss", "switch_loss"}
    calls: dict[str, Callable[[], object]] = {
        name: lambda name=name: getattr(functional, name)(matrix)
        for name in functional.__all__
        if name not in {"choice_radius", *two}
    }
    calls |= {name: lambda name=name: getattr(functional, name)(matrix) for name in two - {"switch_loss"}}
    modules = [name for name in spectral_router.__all__ if name.endswith(("Penalty", "Loss"))]
    calls |= {name: lambda name=name: getattr(spectral_router, name)()(matrix) for name in modules}
    return calls | {
        "switch_loss": lambda: functional.switch_loss(matrix, top_k=1),
        "a mask": lambda: functional.load_balance_loss(tokens.softmax(-1), np.ones(8, bool)),
        "choice_radius": lambda: functional.choice_radius(np.ones((8, 16)), weight),
        "choice_radius's weight": lambda: functional.choice_radius(tokens, matrix),
        "route": lambda: route(matrix),
        "PrototypeRouter": lambda: PrototypeRouter(16, 4)(matrix),
        "init_from": lambda: PrototypeRouter(16, 4).init_from(matrix),
        "ImportanceConstraint": lambda: ImportanceConstraint(16, 0.5)(matrix),
        "LossFreeBias": lambda: LossFreeBias(16)(matrix),
        "project_spectral_": lambda: spectral_router.project_spectral_(matrix),
        "rescue_collapsed_": lambda: rescue_collapsed_(matrix),
        "rescue_collapsed_'s share": lambda: rescue_collapsed_(weight, share=np.ones(4)),
        "rescue_collapsed_'s tokens": lambda: rescue_collapsed_(weight, x=np.ones((8, 16))),
        "a list": lambda: SpectralRankPenalty()([matrix]),
        "z-loss": lambda: RouterZLoss()(matrix),
    }


@pytest.mark.parametrize("name", sorted(arrays()))
def test_a_numpy_array_where_a_tensor_belongs(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be (a )?tensors?, got ndarray"):
        arrays()[name]()
