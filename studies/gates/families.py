"""Every mixture-of-experts family of transformers as a tiny random model: no download, a second or less each.

Written against transformers 5.23. A family that the installed version lacks raises when it is built.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case, ExpectedGate, ReadProbs, normalised, seeded

__all__ = ["Family", "case_of", "logits_at", "probs_at", "product_keys", "sqrt_softplus_at"]

EXPERTS, TOP_K, HIDDEN, LAYERS = 8, 2, 32, 4

# One size for whatever the configurations call the same thing; a family takes the names that it knows.
_TINY: tuple[tuple[Any, str], ...] = (
    (128, "vocab_size vocab_size_per_layer_input"),
    (HIDDEN, "hidden_size d_model out_hidden_size"),
    (LAYERS, "n_layers num_hidden_layers num_layers encoder_layers decoder_layers num_decoder_layers"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (TOP_K, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts experts_per_token top_k"),
    (TOP_K, "moe_num_experts_per_tok expert_top_k"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers topk_group decoder_sparse_step interleave_moe_layer_step"),
    (1, "moe_layer_start_index moe_layer_interval expert_layer_offset mamba_n_groups n_groups"),
    (2, "n_group num_expert_group num_sparse_encoder_layers num_sparse_decoder_layers encoder_sparse_step zero_expert_num"),
    (2, "expert_layer_period attn_layer_period mamba_expand depth index_n_heads linear_num_key_heads"),
    (
        48,
        "intermediate_size ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim dense_intermediate_size intermediate_size_mlp",
    ),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size"),
    (16, "moe_shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate shared_expert_size"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank router_hidden_size expert_capacity image_size attention_chunk_size"),
    (16, "qk_head_dim index_head_dim"),
    (4, "n_heads num_attention_heads num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads"),
    (4, "linear_num_value_heads mamba_dt_rank mamba_d_conv patch_size index_topk"),
    (8, "head_dim kv_channels d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim global_head_dim linear_key_head_dim"),
    (8, "linear_value_head_dim mamba_d_state mamba_n_heads mamba_d_head ssm_state_size mamba_num_heads mamba_head_dim"),
    (8, "chunk_size sliding_window hidden_size_per_layer_input"),
    (64, "max_position_embeddings max_sequence_length max_seq_len"),
    (True, "enable_moe_block is_moe norm_topk_prob"),
    (False, "use_cache"),
    (0, "pad_token_id decoder_start_token_id attn_layer_offset num_nextn_predict_layers encoder_layerdrop decoder_layerdrop"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (1e-6, "rms_norm_eps"),
    ([], "mlp_only_layers"),
)
TINY: dict[str, Any] = {name: value for value, names in _TINY for name in names.split()}


@dataclass(frozen=True)
class Family:
    """One family: its model, where its gates are, and how one forward pass of a gate shows its probabilities.

    model: name of the model class; one that ends in `Model` is built without a head.
    gate: path of the module that is called, with `{}` for the number of the layer; several are separated by spaces.
    layers: the layers that have gates.
    read: takes `(module, arguments, output)` of the gate to probabilities.
    weight: path of the weight from the gate on.
    config: what the tiny configuration must say beside `TINY`.
    """

    name: str
    model: str
    gate: str
    layers: tuple[int, ...]
    scoring: str
    read: ReadProbs
    weight: str = "weight"
    num_experts: int = EXPERTS
    config: dict[str, Any] = field(default_factory=dict)
    runs: bool = True


# ------------------------------------------------------------------------------------------ how a gate shows its probabilities


def _scored(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits.float().softmax(-1)
    scores = logits.float().sigmoid() if scoring == "sigmoid" else nn.functional.softplus(logits.float()).sqrt()
    return normalised(scores)


def _read_logits(scoring: str, index: int | None, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return _scored(output if index is None else output[index], scoring)


def logits_at(scoring: str, index: int | None = 0) -> ReadProbs:
    """The gate returns logits: alone if `index` is None, else at that place of a tuple."""
    return partial(_read_logits, scoring, index)


def probs_at(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """The gate returns probabilities first."""
    probs: Tensor = output[0]
    return probs


def sqrt_softplus_at(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """The gate returns logits first, and scores them by the root of their softplus."""
    return _scored(output[0], "sqrtsoftplus")


def product_keys(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Doge: half of the rows are keys of a table's rows, half are keys of its columns, and each cell is an expert.

    The probability of an expert is the product of the softmax over the row keys and the softmax over the column keys. These
    two, side by side and halved, are the probabilities of the keys; they sum to one over the `2 * keys` rows of the weight.
    The two halves are cut as the model cuts them, along the flattened batch, which mixes neighbouring tokens.
    """
    rows, columns = output.reshape(2, -1, output.shape[-1] // 2).softmax(-1)
    return torch.cat([rows, columns], -1) / 2


# ---------------------------------------------------------------------------------------------------------------- the builder


def tiny_config(config_class: type, changes: dict[str, Any], depth: int = 0) -> Any:
    """A configuration of this class with every size it knows made small."""
    default = config_class()
    known = set(default.to_dict()) | set(inspect.signature(config_class).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    settings: dict[str, Any] = {}
    for name in known & set(TINY):
        # a list has one entry a layer, so one number cannot stand for it
        if not isinstance(_value(default, name), (list, tuple)) or isinstance(TINY[name], list):
            settings[name] = TINY[name]
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if inspect.isclass(part) and part.__name__ != "AutoConfig" and depth < 2:
            try:
                settings[name] = tiny_config(part, {}, depth + 1)
            except Exception:  # a vision tower that no small size fits keeps its own; it is not built
                continue
    config = config_class(**settings | changes)
    config._attn_implementation = "eager"
    return config


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configurations refuse to name one value where the layers have several
        return None


def _build(family: Family) -> tuple[nn.Module, dict[str, Any]]:
    modeling = importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")
    model_class = getattr(modeling, family.model)
    annotation: Any = typing.get_type_hints(model_class.__init__).get("config")
    config_class: type = annotation if hasattr(annotation, "to_dict") else model_class.config_class
    model: nn.Module = model_class(tiny_config(config_class, family.config)).eval().float()
    gates = {f"{path.format(layer)}.{family.weight}" for layer in range(LAYERS) for path in family.gate.split()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gates or ".router_mlp." in name:  # logits with a spread near one, so that readings differ
                parameter.normal_(0, 1 / 4)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.05)
            # what starts at zero or one would not show in the probabilities whether it is read or not
            elif name.endswith(("router.bias", "router.scale", "per_expert_scale", "correction_bias", "expert_bias")):
                parameter.add_(torch.randn_like(parameter) / 2)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias", "balancing_biases")):
                buffer.add_(torch.randn_like(buffer) / 10)
            elif name.endswith("tid2eid"):  # the experts of each token id, two different ones
                first = torch.randint(EXPERTS, (len(buffer), 1))
                buffer.copy_((first + torch.arange(TOP_K)) % EXPERTS)
    ids = torch.randint(3, 100, (2, 8))
    takes = inspect.signature(model.forward).parameters
    inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if name in takes}
    if family.name == "ernie4_5_vl_moe":  # the vision gates see the tokens of an image only
        kinds = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]] * 2)
        inputs["mm_token_type_ids"] = inputs["moe_mm_token_type_ids"] = kinds
    return model, inputs


def case_of(family: Family) -> Case:
    """The family as a case of the survey."""
    expected = tuple(
        ExpectedGate(
            f"{path.format(layer)}.{family.weight}", family.num_experts, family.scoring, path.format(layer), family.read
        )
        for layer in family.layers
        for path in family.gate.split()
    )
    return Case(family.name, seeded(partial(_build, family)), expected, family.runs)
