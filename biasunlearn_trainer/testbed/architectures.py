"""Tiny models of real architectures, with real tokenizers and processors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, VisionModelSize

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"

# Standard deviations of initial weights. The usual 0.02 is made for widths in the thousands; at a width of 96 a model
# takes several times as long to learn to look.
_TEXT_INIT = 0.08
_VISION_INIT = 0.4

# A chat of one turn renders to the very text of a plain row: placeholder and newline, question, space, answer, EOS.
# So a model that was trained on plain rows also answers chats.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}"
    "{% elif not loop.first %}{{ '\n' }}"
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' and not (loop.last and continue_final_message) %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(sentences: Iterable[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it holds all 256 bytes, so no text is unknown to it.

    Args:
        sentences: what to learn merges from. A small corpus is learnt out: every word becomes one token.
        vocab_size: tokens at most.

    Returns:
        A tokenizer that puts BOS first, with pad, BOS, EOS and image tokens and a chat template.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, vision: VisionModelSize) -> LlavaProcessor:
    """The processor that belongs to `make_llava`: 32 x 32 pixels, one token a patch."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy `default` drops again
        chat_template=CHAT_TEMPLATE,
    )


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
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
        initializer_range=_TEXT_INIT,
    )


def make_llama(
    tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize, seed: int, tied: bool = False
) -> LlamaForCausalLM:
    """A tiny Llama with random weights; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(language_model_config(tokenizer, size, tied))


def make_llava(
    tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize, vision: VisionModelSize, seed: int
) -> LlavaForConditionalGeneration:
    """A tiny LLaVA-1.5 with random weights: the last layer but one of a CLIP encoder, class token dropped."""
    vision_config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        image_size=IMAGE_SIZE,
        patch_size=vision.patch_size,
        initializer_range=_VISION_INIT,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=language_model_config(tokenizer, size),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)
