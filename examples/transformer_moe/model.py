"""Models: a small new one of an architecture of transformers with a tokenizer of bytes, or one that exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.shared.command import ExperimentError

from .config import Config

END = 256  # of a text; the bytes are 0 ... 255
HEADS = 4


def tokenizer(config: Config) -> Any:
    if config.model is None:
        return byte_tokenizer()
    with _loading(config.model):
        found = AutoTokenizer.from_pretrained(config.model)
    if found.eos_token_id is None:
        raise ExperimentError(f"--model needs a tokenizer with an end-of-text token, got none in {config.model}")
    return found


def byte_tokenizer() -> Any:
    """Token i is byte i: byte-level BPE without a merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level BPE writes a byte as a letter: printable ones as themselves, the others from U+0100 on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    core = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)


def settings(config: Config) -> Any:
    """The configuration of the new model."""
    common: dict[str, Any] = {
        "vocab_size": END + 1,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": None,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts_per_tok": config.top_k,
        "max_position_embeddings": config.sequence,
        "use_cache": False,
    }
    match config.architecture:
        case "mixtral":
            return transformers.MixtralConfig(**common, intermediate_size=config.hidden, num_local_experts=config.experts)
        case "olmoe":
            return transformers.OlmoeConfig(**common, intermediate_size=config.hidden, num_experts=config.experts)
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **common,
                intermediate_size=config.hidden,
                moe_intermediate_size=config.hidden,
                num_experts=config.experts,
                norm_topk_prob=True,
            )
    return transformers.GptOssConfig(
        **common,
        head_dim=config.dim // HEADS,
        intermediate_size=config.hidden,
        num_local_experts=config.experts,
        sliding_window=config.sequence,
    )


def build(config: Config, seed: int) -> Any:
    """A model to begin with; for one seed it is the same in every arm."""
    if config.model is not None:
        return restore(config.model)
    torch.manual_seed(seed)
    return empty(settings(config))


def empty(settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def restore(folder: Path | str) -> Any:
    with _loading(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def quiet() -> None:
    """No bars and notes of transformers: results are ours to print."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def _loading(name: Path | str) -> Iterator[None]:
    """Errors of `from_pretrained` as one sentence; a damaged folder can raise anything."""
    quiet()
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExperimentError(f"--model cannot read {name}: {reason}") from error
