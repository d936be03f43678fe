"""Gates by names and shapes, as other code bases call them; look-alikes are left alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectral_router import inspect_checkpoint
from spectral_router.report.by_name import gates_by_name, selection_bias_beside
from spectral_router.report.stored import Checkpoint, Stored
from studies.gates import GROUPS
from studies.gates.cases import Case

K, D, H = 8, 32, 48


def checkpoint(shapes: dict[str, tuple[int, ...]], config: dict | None = None) -> Checkpoint:
    def read() -> Tensor:
        raise AssertionError("only names and shapes are needed here")

    return Checkpoint(Path("here"), "test", {name: Stored(shape, "F32", read) for name, shape in shapes.items()}, config or {})


def numbered(pattern: str, shape: tuple[int, ...] = (H, D), count: int = K) -> dict[str, tuple[int, ...]]:
    return {pattern.format(i): shape for i in range(count)}


CODE_BASES = {
    "Megatron, grouped": ("decoder.layers.4.mlp.router.weight", numbered("decoder.layers.4.mlp.experts.linear_fc1.weight{}")),
    "Megatron, local": (
        "decoder.layers.4.mlp.router.weight",
        numbered("decoder.layers.4.mlp.experts.local_experts.{}.linear_fc1.weight"),
    ),
    "DeepSpeed": (
        "model.layers.4.mlp.deepspeed_moe.gate.wg.weight",
        numbered("model.layers.4.mlp.deepspeed_moe.experts.deepspeed_experts.{}.up_proj.weight"),
    ),
    "torchtitan": (
        "layers.4.moe.router.gate.weight",
        {"layers.4.moe.experts.w1": (K, H, D), "layers.4.moe.experts.w2": (K, D, H)},
    ),
    "MegaBlocks": ("transformer.blocks.4.ffn.router.layer.weight", {"transformer.blocks.4.ffn.experts.mlp.w1": (K * H, D)}),
    "DeepSeek": ("layers.4.ffn.gate.weight", numbered("layers.4.ffn.experts.{}.w1.weight")),
    "mixture-of-experts": ("layers.4.gate.w_gating", {"layers.4.experts.w1": (K, D, H), "layers.4.experts.w2": (K, H, D)}),
    "llama.cpp": ("blk.4.ffn_gate_inp.weight", {"blk.4.ffn_up_exps.weight": (K, H, D)}),
}


@pytest.mark.parametrize("name", CODE_BASES)
def test_gates_of_other_code_bases_are_found(name: str) -> None:
    key, experts = CODE_BASES[name]
    shape = (D, K) if name == "mixture-of-experts" else (K, D)
    decoys = {
        "decoder.layers.4.mlp.shared_experts.gate_weight": (1, D),
        "layers.4.mlp.gate_proj.weight": (H, D),
        "optimizer.layers.4.moe.router.gate.weight": (K, D),
        "layers.4.self_attn.o_gate.weight": (K, D),
    }
    gates, _ = gates_by_name(checkpoint({key: shape, **experts, **decoys}))
    assert [gate.key for gate in gates] == [key]
    assert (gates[0].num_experts, gates[0].transposed) == (K, name == "mixture-of-experts")
    assert (gates[0].note is not None) == (name == "MegaBlocks")  # experts that do not tell their number


# a flat gate beside flat experts, which no shape tells apart; a stack of gates, of a hierarchy
UNKNOWN = {"flat_rows", "mixture_of_experts_hierarchical"}
OTHERS = [case for group, cases in GROUPS.items() if group != "transformers" for case in cases]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_a_state_dict_of_any_model_of_the_study(case: Case, tmp_path: Path) -> None:
    """All gates or a refusal, and nothing that is none."""
    model, _ = case.build()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    expected = {gate.parameter for gate in case.expected}
    if not expected or case.name in UNKNOWN:
        with pytest.raises(ValueError, match="has no router gate among its"):
            inspect_checkpoint(tmp_path / "model.pt")
    else:
        assert {gate.key for gate in inspect_checkpoint(tmp_path / "model.pt").gates} == expected


def test_a_square_gate_is_said_to_be_read_by_rows() -> None:
    gates, _ = gates_by_name(checkpoint({"layers.0.gate.weight": (K, K), "layers.0.experts.w1": (K, D, H)}))
    assert gates[0].note == "8 x 8: rows taken for the experts"


def test_a_gate_without_experts_is_a_near_miss() -> None:
    gates, misses = gates_by_name(checkpoint({"layers.0.attn.gate.weight": (D, D), "head.weight": (K, D)}))
    assert gates == []
    assert misses == ["layers.0.attn.gate.weight (32, 32)"]


def test_the_bias_of_the_layer_itself_and_no_other() -> None:
    shapes = numbered("layers.{}.mlp.gate.weight", (K, D), 12) | numbered("layers.{}.mlp.gate.expert_bias", (K,), 12)
    found = selection_bias_beside(checkpoint(shapes), "layers.1.mlp.gate.weight", K)
    assert found == "layers.1.mlp.gate.expert_bias"
    del shapes["layers.1.mlp.gate.expert_bias"]
    assert selection_bias_beside(checkpoint(shapes), "layers.1.mlp.gate.weight", K) is None
    assert torch.Size(shapes["layers.11.mlp.gate.expert_bias"]) == (K,)
