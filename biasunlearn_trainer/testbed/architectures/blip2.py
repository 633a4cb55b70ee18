"""A tiny BLIP-2, with OPT as its language model or, as in MiniGPT-4, with a Llama."""

from __future__ import annotations

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from biasunlearn_trainer.testbed.architectures.llama import (
    TEXT_INIT,
    VISION_INIT,
    language_model_config,
    seeded,
    token_ids,
)
from biasunlearn_trainer.testbed.architectures.tokenizer import IMAGE
from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, QFormerSize, VisionModelSize

# Queries that begin as zeros, as the class makes them, would all ask the same and never part.
_QUERY_INIT = 1.0
# At 0.08 every query looks at the whole picture alike, and takes long to begin to choose.
_QFORMER_INIT = 0.2


def make_blip2_processor(tokenizer: PreTrainedTokenizerFast, qformer: QFormerSize) -> Blip2Processor:
    """The processor that belongs to both models: it puts one token a query before the text."""
    return Blip2Processor(
        image_processor=BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        num_query_tokens=qformer.num_queries,
    )


def opt_config(tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize) -> OPTConfig:
    """The configuration of a tiny OPT, without dropout: a short training has no use for it."""
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        word_embed_proj_dim=size.hidden_size,
        ffn_dim=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        max_position_embeddings=size.max_positions,
        dropout=0.0,
        init_std=TEXT_INIT,
        **token_ids(tokenizer),
    )


def make_blip2(
    tokenizer: PreTrainedTokenizerFast,
    size: LanguageModelSize,
    vision: VisionModelSize,
    qformer: QFormerSize,
    seed: int,
) -> Blip2ForConditionalGeneration:
    """A tiny BLIP-2 OPT with random weights."""
    return _make(opt_config(tokenizer, size), tokenizer, vision, qformer, seed)


def make_minigpt4(
    tokenizer: PreTrainedTokenizerFast,
    size: LanguageModelSize,
    vision: VisionModelSize,
    qformer: QFormerSize,
    seed: int,
) -> Blip2ForConditionalGeneration:
    """A tiny MiniGPT-4 with random weights: BLIP-2's image half and a projection into a Llama."""
    return _make(language_model_config(tokenizer, size), tokenizer, vision, qformer, seed)


def _make(
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    vision: VisionModelSize,
    qformer: QFormerSize,
    seed: int,
) -> Blip2ForConditionalGeneration:
    vision_config = Blip2VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=IMAGE_SIZE,
        patch_size=vision.patch_size,
        initializer_range=VISION_INIT,
    )
    qformer_config = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=qformer.hidden_size,
        intermediate_size=qformer.intermediate_size,
        num_hidden_layers=qformer.num_layers,
        num_attention_heads=qformer.num_heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_QFORMER_INIT,
    )
    config = Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=qformer.num_queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        initializer_range=TEXT_INIT,
    )
    with seeded(seed), torch.no_grad():
        model = Blip2ForConditionalGeneration(config)
        model.query_tokens.normal_(std=_QUERY_INIT)
        return model
