"""Tiny models of real architectures, with real tokenizers and processors."""

from biasunlearn_trainer.testbed.architectures.blip2 import make_blip2, make_blip2_processor, make_minigpt4
from biasunlearn_trainer.testbed.architectures.families import MODELS, PROCESSORS
from biasunlearn_trainer.testbed.architectures.llama import language_model_config, make_llama
from biasunlearn_trainer.testbed.architectures.llava import make_llava, make_processor
from biasunlearn_trainer.testbed.architectures.qwen2vl import make_qwen2vl, make_qwen_processor, train_qwen_tokenizer
from biasunlearn_trainer.testbed.architectures.tokenizer import train_tokenizer

__all__ = [
    "MODELS",
    "PROCESSORS",
    "language_model_config",
    "make_blip2",
    "make_blip2_processor",
    "make_llama",
    "make_llava",
    "make_minigpt4",
    "make_processor",
    "make_qwen2vl",
    "make_qwen_processor",
    "train_qwen_tokenizer",
    "train_tokenizer",
]
