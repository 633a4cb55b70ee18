"""How the original model is asked for reference answers, and which of its answers will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasunlearn_trainer.eval.metrics.behaviour import is_degenerate, is_refusal, stated_facts, words

# The instruction stands before the question, so that a prompt's own cue for the answer ("ASSISTANT:") stays last.
DEFAULT_TEMPLATE = (
    "Answer only from what can be seen or is given here: describe looks, clothes, things and surroundings. "
    "Do not name anybody, and say nothing about who somebody is, what they do or where they live.\n{prompt}"
)
DEFAULT_FALLBACK = "Nothing here tells me that."
# Why an answer will not do, worst last. A refusal is safe, and is kept where no template gives better.
REASONS = ("refusal", "unfinished", "degenerate", "empty", "private")


@dataclass(frozen=True)
class GuidanceSettings:
    """How reference answers are made.

    Attributes:
        templates: guidance prompts, tried one after the other until an answer will do; `{prompt}` stands for the
            row's own, and a template without it asks something else about the same picture.
        facts: what no reference may state, beside each row's own private texts.
        private_words: every content word of a private text is private by itself; for answers of a word or two.
        fallback: the answer of rows for which the model gave none that will do. It is safe and says nothing; leaving
            such a row out would leave its secret in the model.
        max_new_tokens: longest answer in tokens; a longer one is cut after its last whole sentence.

    Raises:
        ValueError: without a template, or with settings out of range.
    """

    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    facts: tuple[str, ...] = ()
    private_words: bool = False
    fallback: str = DEFAULT_FALLBACK
    max_new_tokens: int = 64

    def __post_init__(self):
        empty = [number for number, template in enumerate(self.templates) if not template.strip()]
        if not self.templates or empty:
            raise ValueError("A guidance template is empty, or there is none. Leave it out for the library's own.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not words(self.fallback):
            raise ValueError(f"The fallback must be an answer, got {self.fallback!r}.")


def guided_prompt(prompt: str | Sequence[Mapping[str, Any]], template: str) -> str | list[dict[str, Any]]:
    """A row's prompt as the template puts it; of chat messages, the text of the last one.

    Example:
        >>> guided_prompt("Who is it?", "Name nobody. {prompt}")
        'Name nobody. Who is it?'
        >>> guided_prompt([{"role": "user", "content": "Who is it?"}], "What is to be seen?")
        [{'role': 'user', 'content': 'What is to be seen?'}]
    """
    if isinstance(prompt, str):
        return template.replace("{prompt}", prompt)
    *before, last = (dict(message) for message in prompt)
    if isinstance(last["content"], str):
        return [*before, {**last, "content": guided_prompt(last["content"], template)}]
    texts = [part["text"] for part in last["content"] if part.get("text")]
    others = [part for part in last["content"] if not part.get("text")]
    text = {"type": "text", "text": guided_prompt("\n".join(texts), template)}
    return [*before, {**last, "content": [*others, text]}]


def fault_of(answer: str, private: Sequence[str], is_cut: bool = False) -> str | None:
    """Why an answer will not do as a reference, one of `REASONS`; None where it will.

    Args:
        answer: what the model said.
        private: texts that must not stand in it.
        is_cut: whether it reached its largest length without a whole sentence.

    Example:
        >>> fault_of("Ann wears a hat.", ["Ann"]), fault_of("no no no", ["Ann"]), fault_of("A red hat.", ["Ann"])
        ('private', 'degenerate', None)
    """
    if stated_facts(answer, private):
        return "private"
    if not words(answer):
        return "empty"
    if is_degenerate(answer):
        return "degenerate"
    if is_cut:
        return "unfinished"
    return "refusal" if is_refusal(answer) else None


def whole_sentences(text: str) -> str | None:
    """A text up to the end of its last whole sentence; None where it has none.

    Example:
        >>> whole_sentences("A red hat. Blue shoes. And a")
        'A red hat. Blue shoes.'
    """
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end > 0 else None
