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
    language_model_config,
    seeded,
    token_ids,
)
from biasunlearn_trainer.testbed.architectures.tokenizer import IMAGE
from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, QFormerSize, VisionModelSize

# A short training does not find out by itself where to look. So each query begins as the position of one patch, and the
# first cross-attention compares the two: at first a query sees mostly its own patch, as in LLaVA a token is a patch.
_POSITION_INIT = 1.0
_LOOK_INIT = 2.0
# What is added to a picture on its way must not drown where it stands.
_IMAGE_HALF_INIT = 0.1


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
    """A tiny MiniGPT-4 with random weights: BLIP-2's image half, its Q-Former frozen, and a projection into a Llama."""
    model = _make(language_model_config(tokenizer, size), tokenizer, vision, qformer, seed)
    model.query_tokens.requires_grad_(False)
    model.qformer.requires_grad_(False)
    return model


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
        initializer_range=_IMAGE_HALF_INIT,
    )
    qformer_config = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=qformer.hidden_size,
        intermediate_size=qformer.intermediate_size,
        num_hidden_layers=qformer.num_layers,
        num_attention_heads=qformer.num_heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_IMAGE_HALF_INIT,
    )
    config = Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=qformer.num_queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        initializer_range=TEXT_INIT,
    )
    with seeded(seed):
        model = Blip2ForConditionalGeneration(config)
        _let_queries_look(model)
        return model


@torch.no_grad()
def _let_queries_look(model: Blip2ForConditionalGeneration) -> None:
    """Start the queries at the positions of patches, and the first cross-attention at comparing the two."""
    positions = model.vision_model.embeddings.position_embedding.normal_(std=_POSITION_INIT)
    num_queries, num_patches = model.query_tokens.shape[1], positions.shape[1] - 1
    patches = torch.arange(num_queries) * num_patches // num_queries
    model.query_tokens[0].copy_(positions[0, 1 + patches % num_patches, : model.query_tokens.shape[2]])
    look = model.qformer.encoder.layer[0].crossattention.attention
    torch.nn.init.eye_(look.query.weight).mul_(_LOOK_INIT)
    torch.nn.init.eye_(look.key.weight)
