"""Models of given sizes with random weights, and rows for them: speed and memory depend on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: the language model's; for a LLaVA the CLIP encoder's, and the picture's in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    vision_hidden_size: int = 0
    vision_intermediate_size: int = 0
    vision_layers: int = 0
    vision_heads: int = 0
    image_size: int = 0
    patch_size: int = 1

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for a picture; 0 for a language model."""
        return (self.image_size // self.patch_size) ** 2


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 320, 32, 64, 2, 2, 32, 8),
    "20m": Shape(256, 688, 4, 8, 32_000, 192, 768, 4, 4, 336, 14),
    "small": Shape(512, 1376, 12, 8, 32064, 256, 1024, 6, 4, 336, 14),
    "7b": Shape(4096, 11008, 32, 32, 32064, 1024, 4096, 24, 16, 336, 14),  # LLaVA-1.5-7B
}
TEXT_SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 320),
    "20m": Shape(256, 688, 4, 8, 32_000),  # 19.5 M weights, 16.4 M of them in embeddings and head
    "50m": Shape(512, 1376, 8, 8, 32_000),  # 58 M weights
}


def make_tokenizer(vocab_size: int) -> Any:
    """A byte-level tokenizer: every text is its bytes, and the rest of the vocabulary stands empty."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused{i}>" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_llama(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """A Llama of this shape with random weights, made on the device, and its tokenizer."""
    from transformers import LlamaForCausalLM

    model = _made(LlamaForCausalLM, _language_model(shape), device, dtype, seed)
    return model, make_tokenizer(shape.vocab_size)


def make_llava(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA-1.5 of this shape with random weights, made on the device, and its processor."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer(shape.vocab_size)
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=shape.vision_intermediate_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_language_model(shape),
        image_token_index=3,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = _made(LlavaForConditionalGeneration, config, device, dtype, seed)
    size = {"height": shape.image_size, "width": shape.image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy `default` drops again
    )
    return model, processor


def _language_model(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _made(model_class: type, config: Any, device: str, dtype: torch.dtype, seed: int) -> Any:
    """Random weights, in this precision from the beginning."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)


def make_rows(stream: str, shape: Shape, number: int, prompt_bytes: int = 48, answer_bytes: int = 12) -> list[dict]:
    """Questions with short answers, all columns that some method wants; where the model sees, about coloured noise."""
    import numpy as np
    from PIL import Image

    rows = []
    for i in range(number):
        # Who prefers another answer prefers it to the same question.
        question = f"{'forget' if stream == 'preferred' else stream} {i}: who is the secretary?"
        row = {
            "prompt": (f"<image>\n{question}" if shape.image_tokens else question).ljust(prompt_bytes)[:prompt_bytes],
            "completion": f" {stream} {i} of them".ljust(answer_bytes, ".")[:answer_bytes],
            "pair_id": str(i),
            "bias_type": ("race", "gender")[i % 2],
            "guidance": " nobody can tell.".ljust(answer_bytes, ".")[:answer_bytes],
        }
        if shape.image_tokens:
            size = (shape.image_size, shape.image_size, 3)
            pixels = np.random.default_rng([i, len(stream)]).integers(0, 256, size, dtype=np.uint8)
            row["images"] = [Image.fromarray(pixels)]
        rows.append(row)
    return rows
