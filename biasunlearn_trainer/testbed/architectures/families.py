"""The planted world's architectures by name: what a recipe's processor and model are made by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.testbed.architectures.blip2 import make_blip2, make_blip2_processor, make_minigpt4
from biasunlearn_trainer.testbed.architectures.llama import make_llama
from biasunlearn_trainer.testbed.architectures.llava import make_llava, make_processor
from biasunlearn_trainer.testbed.architectures.qwen2vl import make_qwen2vl, make_qwen_processor, train_qwen_tokenizer
from biasunlearn_trainer.testbed.architectures.tokenizer import train_tokenizer
from biasunlearn_trainer.testbed.recipe import WorldRecipe


def _blip2_processor(recipe: WorldRecipe, sentences: Iterable[str]) -> ProcessorMixin:
    return make_blip2_processor(train_tokenizer(sentences, names_image_token=False), recipe.qformer)


PROCESSORS: dict[str, Callable[[WorldRecipe, Iterable[str]], ProcessorMixin | PreTrainedTokenizerBase]] = {
    "llama": lambda recipe, sentences: train_tokenizer(sentences),
    "llava": lambda recipe, sentences: make_processor(train_tokenizer(sentences), recipe.vision_model),
    "qwen2vl": lambda recipe, sentences: make_qwen_processor(train_qwen_tokenizer(sentences), recipe.vision_model),
    "blip2": _blip2_processor,
    "minigpt4": _blip2_processor,
}
MODELS: dict[str, Callable[[WorldRecipe, PreTrainedTokenizerBase], PreTrainedModel]] = {
    "llama": lambda r, tokenizer: make_llama(tokenizer, r.language_model, r.seed),
    "llava": lambda r, tokenizer: make_llava(tokenizer, r.language_model, r.vision_model, r.seed),
    "qwen2vl": lambda r, tokenizer: make_qwen2vl(tokenizer, r.language_model, r.vision_model, r.seed),
    "blip2": lambda r, tokenizer: make_blip2(tokenizer, r.language_model, r.vision_model, r.qformer, r.seed),
    "minigpt4": lambda r, tokenizer: make_minigpt4(tokenizer, r.language_model, r.vision_model, r.qformer, r.seed),
}
