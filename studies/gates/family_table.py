"""The gates of the 72 mixture-of-experts families of transformers 5.23, as read in their modeling files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .cases import Case, ReadProbs
from .families import Family, case_of, logits_at, probs_at, product_keys, sqrt_softplus_at

__all__ = ["FAMILIES", "TRANSFORMERS"]

ALL, AFTER_DENSE, LAST = (0, 1, 2, 3), (1, 2, 3), (3,)
MLP_GATE, MLP_ROUTER = "model.layers.{}.mlp.gate", "model.layers.{}.mlp.router"
BARE_GATE = "layers.{}.mlp.gate"  # of a model without a head
SPARSE_AFTER_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}


def rope(factor: float | None = None, **more: Any) -> dict[str, Any]:
    partial_rotary = {} if factor is None else {"partial_rotary_factor": factor}
    return {"rope_type": "default", "rope_theta": 1e4, **partial_rotary, **more}


def softmax(
    name: str, model: str, gate: str = MLP_GATE, layers: tuple[int, ...] = ALL, read: ReadProbs | None = None, **more: Any
) -> Family:
    return Family(name, model, gate, layers, "softmax", read or logits_at("softmax"), **more)


def sigmoid(
    name: str, model: str, gate: str = MLP_GATE, layers: tuple[int, ...] = ALL, read: ReadProbs | None = None, **more: Any
) -> Family:
    return Family(name, model, gate, layers, "sigmoid", read or logits_at("sigmoid"), **more)


# The softmax of some families (gpt_oss, granite, aria, cohere2, jetmoe) runs over the chosen experts only; renormalised
# probabilities over all experts are the same weights.
_SOFTMAX = (
    softmax("aria", "AriaTextForCausalLM", MLP_ROUTER),
    softmax("cohere2_moe", "Cohere2MoeForCausalLM"),
    # jitter, if configured, multiplies the input in place; the router returns nothing but logits
    softmax(
        "dbrx",
        "DbrxForCausalLM",
        "transformer.blocks.{}.ffn.router",
        read=logits_at("softmax", None),
        weight="layer.weight",
        config={
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    softmax("deepseek_ocr2", "DeepseekOcr2TextModel", BARE_GATE, AFTER_DENSE, config=SPARSE_AFTER_FIRST),
    softmax("deepseek_v2", "DeepseekV2ForCausalLM", layers=AFTER_DENSE),
    # The router normalises and scales its input. The decoder alone cannot run, it reads the cache of an encoder: see `_tied`.
    softmax(
        "diffusion_gemma",
        "DiffusionGemmaDecoderModel",
        "layers.{}.router",
        read=probs_at,
        weight="proj.weight",
        runs=False,
    ),
    # 16 experts are a table of 4 x 4, so 4 + 4 keys; renormalising, it overwrites what its own backward pass needs
    Family(
        "doge",
        "DogeForCausalLM",
        "model.layers.{}.mlp.router_gate",
        ALL,
        "product_keys",
        product_keys,
        config={"num_experts": 16, "norm_topk_prob": False},
    ),
    softmax("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", layers=AFTER_DENSE),
    softmax(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        "layers.{}.mlp.text_moe.gate layers.{}.mlp.vision_moe.gate",
        AFTER_DENSE,
        config={"rope_parameters": rope(mrope_section=[1, 1, 2])},
    ),
    softmax("flex_olmo", "FlexOlmoForCausalLM"),
    # normalises and scales its input; per_layer_input_gate, by chance of the tiny sizes, has the gate's shape
    softmax("gemma4", "Gemma4ForCausalLM", "model.layers.{}.router", read=probs_at, weight="proj.weight"),
    softmax("gpt_oss", "GptOssForCausalLM", MLP_ROUTER),
    softmax("granitemoe", "GraniteMoeForCausalLM", "model.layers.{}.block_sparse_moe.router"),
    softmax("granitemoe_swa", "GraniteMoeSWAForCausalLM", "model.layers.{}.block_sparse_moe.router"),
    softmax("granitemoehybrid", "GraniteMoeHybridForCausalLM", "model.layers.{}.block_sparse_moe.router"),
    softmax("granitemoeshared", "GraniteMoeSharedForCausalLM", "model.layers.{}.block_sparse_moe.router"),
    softmax("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", weight="wg.weight"),
    softmax(
        "jamba",
        "JambaForCausalLM",
        "model.layers.{}.feed_forward.router",
        (1, 3),
        config={"num_key_value_heads": 2},
    ),
    # attention is a mixture too
    softmax(
        "jetmoe",
        "JetMoeForCausalLM",
        "model.layers.{}.self_attention.experts.router model.layers.{}.mlp.router",
        read=logits_at("softmax", 4),
        weight="layer.weight",
    ),
    # two experts that do nothing are scored with the others, by F.linear on the weight of `classifier`
    softmax("longcat_flash", "LongcatFlashForCausalLM", MLP_ROUTER, weight="classifier.weight", num_experts=10),
    softmax("mellum", "MellumForCausalLM"),
    softmax("minimax", "MiniMaxForCausalLM"),
    softmax(
        "mistral4",
        "Mistral4ForCausalLM",
        layers=AFTER_DENSE,
        config={"rope_parameters": rope(0.5, llama_4_scaling_beta=0.1, original_max_position_embeddings=64)},
    ),
    softmax("mistral_large4", "MistralLarge4TextModel", BARE_GATE, AFTER_DENSE),
    softmax("mixtral", "MixtralForCausalLM"),
    softmax("olmoe", "OlmoeForCausalLM"),
    softmax("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", MLP_ROUTER),
    # Sparsemixer: chosen by noise among the experts near the best, and where one alone is near, its weight is one and the
    # loss sends the gate no gradient. Jitter multiplies the input in place.
    softmax("phimoe", "PhimoeForCausalLM", MLP_ROUTER, config={"input_jitter_noise": 0.1}),
    softmax("qwen2_moe", "Qwen2MoeForCausalLM"),
    softmax("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    softmax("qwen3_moe", "Qwen3MoeForCausalLM"),
    softmax("qwen3_next", "Qwen3NextForCausalLM"),
    softmax("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel", BARE_GATE),
    softmax("qwen3_vl_moe", "Qwen3VLMoeTextModel", BARE_GATE),
    softmax(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        config={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    softmax("unlimited_ocr", "UnlimitedOcrTextModel", BARE_GATE, AFTER_DENSE),
    # an MLP with a state carried from layer to layer; the ninth class skips the token
    softmax("zaya", "ZayaForCausalLM", weight="router_mlp.out_proj.weight", num_experts=9, config={"num_experts_per_tok": 1}),
)

# jitter, in training, multiplies the input in place
_SWITCH = softmax(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "",
    (),
    logits_at("softmax", 2),
    weight="classifier.weight",
)
_NLLB = softmax("nllb_moe", "NllbMoeForConditionalGeneration", "", (), logits_at("softmax", 2), weight="classifier.weight")

_SIGMOID = (
    sigmoid("afmoe", "AfmoeForCausalLM", MLP_ROUTER, AFTER_DENSE, weight="gate.weight"),
    sigmoid("axk1", "AXK1ForCausalLM", layers=AFTER_DENSE),
    sigmoid("axk2", "AXK2ForCausalLM", layers=AFTER_DENSE),
    sigmoid("bailing_hybrid", "BailingHybridForCausalLM", layers=AFTER_DENSE),
    sigmoid("beam", "BeamForCausalLM", layers=LAST),
    sigmoid("deepseek_v3", "DeepseekV3ForCausalLM", layers=AFTER_DENSE),
    sigmoid("deepseek_v32", "DeepseekV32ForCausalLM", layers=AFTER_DENSE),
    # the first three layers take their experts from a table of token ids, and their weights from the gate
    Family("deepseek_v4", "DeepseekV4ForCausalLM", MLP_GATE, ALL, "sqrtsoftplus", sqrt_softplus_at),
    sigmoid("dots1", "Dots1ForCausalLM", layers=AFTER_DENSE),
    # its sliding layers would keep the sizes of the big model
    sigmoid("dots3_note", "Dots3NoteForCausalLM", layers=AFTER_DENSE, config={"per_layer_config": {}, "head_dim": 16}),
    sigmoid("exaone_moe", "ExaoneMoeForCausalLM", layers=AFTER_DENSE),
    sigmoid("flint", "FlintForCausalLM"),
    sigmoid("glm4_moe", "Glm4MoeForCausalLM", layers=AFTER_DENSE),
    sigmoid("glm4_moe_lite", "Glm4MoeLiteForCausalLM", layers=AFTER_DENSE),
    sigmoid(
        "glm4v_moe",
        "Glm4vMoeTextModel",
        BARE_GATE,
        AFTER_DENSE,
        config={"rope_parameters": rope(0.5, mrope_section=[1, 1, 0])},
    ),
    sigmoid(
        "glm5_next",
        "Glm5NextTextModel",
        BARE_GATE,
        LAST,
        config={"index_topk": 16, "index_kpool": 4, "qk_rope_head_dim": 0, "linear_num_heads": 4, "linear_head_dim": 8},
    ),
    sigmoid("glm_moe_dsa", "GlmMoeDsaForCausalLM", layers=AFTER_DENSE),
    sigmoid("hy_v3", "HYV3ForCausalLM", layers=AFTER_DENSE),
    sigmoid("hy_v4", "HYV4ForCausalLM", layers=AFTER_DENSE),
    # The weight has a ninth row, for the shared expert, which is always used: it is no part of the logits returned. What
    # is true of the eight is their sigmoid; the model then divides by the sum over the chosen and the shared.
    sigmoid("inkling", "InklingForCausalLM"),
    sigmoid("inkling2", "Inkling2ForCausalLM"),
    sigmoid(
        "kimi_linear",
        "KimiLinearForCausalLM",
        layers=AFTER_DENSE,
        config={"linear_attn_config": {"num_heads": 4, "head_dim": 8}},
    ),
    sigmoid("kolibri1", "Kolibri1ForCausalLM"),
    # tanh soft cap; off by default
    sigmoid("laguna", "LagunaForCausalLM", layers=AFTER_DENSE, config={"moe_router_logit_softcapping": 0.5}),
    sigmoid(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "model.layers.{}.feed_forward.gate",
        AFTER_DENSE,
        config={"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    # (sparse scores, logits): the other way round than all others
    sigmoid("llama4", "Llama4ForCausalLM", "model.layers.{}.feed_forward.router", read=logits_at("sigmoid", 1)),
    sigmoid(
        "mimo_v2_flash",
        "MiMoV2FlashForCausalLM",
        layers=AFTER_DENSE,
        # sliding attention has twice as many key heads
        config={
            "num_key_value_heads": 2,
            "head_dim": 24,
            "v_head_dim": 16,
            "rope_parameters": {"full_attention": rope(0.34), "sliding_attention": rope(0.34)},
        },
    ),
    sigmoid("minimax_m2", "MiniMaxM2ForCausalLM"),
    sigmoid("minimax_m3_vl", "MiniMaxM3VLForCausalLM"),
    sigmoid("muse_spark", "MuseSparkTextModel", BARE_GATE),  # logits are scaled by output_multiplier
    sigmoid("nemotron_h", "NemotronHForCausalLM", "model.layers.{}.mixer.gate", (1,)),
    sigmoid("solar_open", "SolarOpenForCausalLM"),
    sigmoid("step3p7", "Step3p7TextModel", BARE_GATE, LAST),
)


def _two_stacks(family: Family, encoder: str, decoder: str) -> Case:
    """An encoder with gates in its odd layers, then a decoder with gates in all."""
    parts = (replace(family, gate=encoder, layers=(1, 3)), replace(family, gate=decoder, layers=ALL))
    return replace(case_of(parts[0]), expected=tuple(gate for part in parts for gate in case_of(part).expected))


def _tied() -> Case:
    """Encoder and decoder share their gates: one parameter, named after the encoder, in two modules that both run.

    Each layer is listed twice, as both modules are gates to balance.
    """
    gate = "encoder.language_model.layers.{}.router"
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 16}
    family = softmax(
        "diffusion_gemma", "DiffusionGemmaModel", gate, read=probs_at, weight="proj.weight", config={"vision_config": vision}
    )
    case = case_of(family)
    twins = tuple(replace(gate, module=f"decoder.layers.{layer}.router") for layer, gate in enumerate(case.expected))
    return replace(case, name="diffusion_gemma_tied", expected=case.expected + twins)


FAMILIES: tuple[Family, ...] = (*_SOFTMAX, *_SIGMOID, _SWITCH, _NLLB)

TRANSFORMERS: tuple[Case, ...] = tuple(
    sorted(
        (
            _tied(),
            *map(case_of, (*_SOFTMAX, *_SIGMOID)),
            _two_stacks(_SWITCH, "encoder.block.{}.layer.1.mlp.router", "decoder.block.{}.layer.2.mlp.router"),
            _two_stacks(_NLLB, "model.encoder.layers.{}.ffn.router", "model.decoder.layers.{}.ffn.router"),
        ),
        key=lambda case: case.name,
    )
)
