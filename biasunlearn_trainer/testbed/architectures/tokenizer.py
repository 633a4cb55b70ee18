"""The tokenizer of the tiny models: every word of a small world is one token, and no text is unknown."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"


def chat_template(placeholder: str, bos: bool = True) -> str:
    """A template whose chat of one turn renders to the very text of a plain row: picture, question, answer, EOS.

    So a model that was trained on plain rows also answers chats.

    Args:
        placeholder: what stands for a picture; empty where the processor puts its image tokens in by itself.
        bos: begin with the tokenizer's BOS.
    """
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'assistant' %}{{ ' ' }}"
        + "{% elif not loop.first %}{{ '\n' }}"
        + "{% endif %}"
        + "{% if message['content'] is string %}{{ message['content'] | trim }}"
        + "{% else %}"
        + "{% for part in message['content'] %}"
        + "{% if part['type'] == 'image' %}{{ '"
        + placeholder
        + "' }}{% else %}{{ part['text'] | trim }}{% endif %}"
        + "{% endfor %}"
        + "{% endif %}"
        + "{% if message['role'] == 'assistant' and not (loop.last and continue_final_message) %}{{ eos_token }}"
        + "{% endif %}"
        + "{% endfor %}"
    )


def train_bpe(sentences: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE: it holds all 256 bytes, and of a small corpus every word becomes one token."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    return backend


def train_tokenizer(
    sentences: Iterable[str], vocab_size: int = 4000, names_image_token: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of Llama and OPT.

    Args:
        sentences: what to learn merges from.
        vocab_size: tokens at most.
        names_image_token: give the tokenizer its `image_token` attribute, as LLaVA's has; BLIP-2's must not have one.

    Returns:
        A tokenizer that puts BOS first, with pad, BOS, EOS and image tokens and a chat template.
    """
    backend = train_bpe(sentences, vocab_size, [PAD, BOS, EOS, IMAGE])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        **(
            {"extra_special_tokens": {"image_token": IMAGE}, "chat_template": chat_template(f"{IMAGE}\n")}
            if names_image_token
            else {"chat_template": chat_template("")}
        ),
    )
