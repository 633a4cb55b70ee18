"""A tiny Llama, alone and as the language model of LLaVA and MiniGPT-4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from biasunlearn_trainer.testbed.recipe import LanguageModelSize

# Standard deviations of initial weights. The usual 0.02 is made for widths in the thousands; at a width of 96 a model
# takes several times as long to learn to look.
TEXT_INIT = 0.08
VISION_INIT = 0.4


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights drawn inside are those of the seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids that a configuration wants."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def language_model_config(
    tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize, tied: bool = False
) -> LlamaConfig:
    """The configuration of a tiny Llama."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=tied,
        initializer_range=TEXT_INIT,
        **token_ids(tokenizer),
    )


def make_llama(
    tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize, seed: int, tied: bool = False
) -> LlamaForCausalLM:
    """A tiny Llama with random weights; equal seeds give equal weights."""
    with seeded(seed):
        return LlamaForCausalLM(language_model_config(tokenizer, size, tied))
