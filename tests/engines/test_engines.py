"""The term arrives once on the engines themselves, where they are installed; `python -m studies.engines` prints the same."""

import warnings

import pytest
import torch
from torch import nn

from spectral_router import wrap_moe
from studies.engines.__main__ import ENGINES, installed, run

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.mark.parametrize("engine", ENGINES)
def test_times_are_one(engine: str) -> None:
    if not installed(engine):
        pytest.skip(f"{ENGINES[engine][1]} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(engine)
    refused = {name for name, result in found.items() if isinstance(result, str) and result.startswith("refused: ")}
    assert all(engine == "deepspeed" and "at the step" in name and "ZeRO 0" not in name for name in refused)
    for name in found.keys() - refused:
        assert isinstance(found[name], dict), (name, found[name])
        for gate, (count, error) in found[name].items():
            assert abs(count - 1) < 1e-3, (name, gate)
            assert error < 1e-3, (name, gate)


def test_a_gate_that_torchao_has_quantised() -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)

    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(64, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(p * expert(x) for p, expert in zip(self.router(x).softmax(-1).split(1, -1), self.experts, strict=True))

    model = MoE()
    exact = torch.linalg.matrix_norm(model.router.weight.detach(), 2).item()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "router")
    handle = wrap_moe(model)
    with pytest.warns(UserWarning, match="quantised gates are read but left alone.*router"):
        (model(torch.randn(8, 64)).square().mean() + handle.loss()).backward()
    assert handle.metrics()["router"]["sigma_max"] == pytest.approx(exact, rel=1e-2)
