"""A tiny LLaVA-1.5."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from biasunlearn_trainer.testbed.architectures.llama import VISION_INIT, language_model_config, seeded, token_ids
from biasunlearn_trainer.testbed.architectures.tokenizer import IMAGE
from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, VisionModelSize


def make_processor(tokenizer: PreTrainedTokenizerFast, vision: VisionModelSize) -> LlavaProcessor:
    """The processor that belongs to `make_llava`: 32 x 32 pixels, one token a patch."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy `default` drops again
        chat_template=tokenizer.chat_template,
    )


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
        initializer_range=VISION_INIT,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=language_model_config(tokenizer, size),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **token_ids(tokenizer),
    )
    with seeded(seed):
        return LlavaForConditionalGeneration(config)
