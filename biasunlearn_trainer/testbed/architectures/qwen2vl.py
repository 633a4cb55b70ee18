"""A tiny Qwen2-VL: no BOS, pictures of any size cut into patches of which four become one token."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from biasunlearn_trainer.testbed.architectures.llama import TEXT_INIT, seeded
from biasunlearn_trainer.testbed.architectures.tokenizer import chat_template, train_bpe
from biasunlearn_trainer.testbed.drawing import IMAGE_SIZE
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, VisionModelSize

PAD, EOS = "<|endoftext|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
MERGE_SIZE = 2  # patches along the side of a token
# Larger, as LLaVA has it, the two blocks drown the patches, and left and right are learned late or not at all.
_VISION_INIT = 0.15
FRAMES = 2  # pictures of a patch in time; a still picture is doubled


def train_qwen_tokenizer(sentences: Iterable[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of Qwen2: its own special tokens, and no BOS."""
    special = [PAD, "<|im_start|>", EOS, VISION_START, VISION_END, IMAGE, VIDEO]
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(sentences, vocab_size, special),
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(f"{VISION_START}{IMAGE}{VISION_END}", bos=False),
    )


def make_qwen_processor(tokenizer: PreTrainedTokenizerFast, vision: VisionModelSize) -> Qwen2VLProcessor:
    """The processor that belongs to `make_qwen2vl`; it needs torchvision for its video half."""
    from transformers import Qwen2VLVideoProcessor

    patches = {"patch_size": vision.patch_size, "merge_size": MERGE_SIZE, "temporal_patch_size": FRAMES}
    pixels = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=pixels, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, **patches),
        chat_template=tokenizer.chat_template,
    )


def make_qwen2vl(
    tokenizer: PreTrainedTokenizerFast, size: LanguageModelSize, vision: VisionModelSize, seed: int
) -> Qwen2VLForConditionalGeneration:
    """A tiny Qwen2-VL with random weights: positions in time, height and width, a merger behind the image encoder."""
    head_size = size.hidden_size // size.num_heads
    third = head_size // 6  # of half a head's rotations, for time, height and width
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_size // 2 - 2 * third, third, third],
        },
        "initializer_range": TEXT_INIT,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision_config = {
        "depth": vision.num_layers,
        "embed_dim": vision.hidden_size,
        "hidden_size": size.hidden_size,
        "num_heads": vision.num_heads,
        "mlp_ratio": vision.intermediate_size // vision.hidden_size,
        "patch_size": vision.patch_size,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": FRAMES,
        "initializer_range": _VISION_INIT,
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    with seeded(seed):
        return Qwen2VLForConditionalGeneration(config)
