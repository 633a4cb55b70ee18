"""Asks the original model for reference answers, once, and keeps them.

What is known stands in the cache after every few batches, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.behaviour import private_of
from biasunlearn_trainer.fingerprints import DIGEST_BYTES, model_parts, rows_fingerprint
from biasunlearn_trainer.guidance.settings import REASONS, GuidanceSettings, fault_of, guided_prompt, whole_sentences
from biasunlearn_trainer.kept_items import KeptItems

logger = logging.getLogger(__name__)

COLUMN, PROMPT_COLUMN, REASON_COLUMN = "guidance", "guidance_prompt", "guidance_rejected"
BATCHES_AT_ONCE = 8
# From this share of fall-back answers on, PUBG teaches the fall-back rather than the model's own behaviour.
MANY_REJECTED = 0.2


@dataclass(frozen=True)
class Guidance:
    """A row's reference answer.

    Attributes:
        answer: the text.
        template: number of the template whose answer it is; None for the fall-back.
        rejected: what is wrong with the best answer of the model, one of `REASONS`; None where it will do.
    """

    answer: str
    template: int | None
    rejected: str | None


class GuidanceBuilder:
    """Reference answers of one model.

    Args:
        scorer: around the original model.
        settings: how to ask, and what to reject.
        cache_dir: where answers are kept; None for `cache_home() / "guidance"`.
    """

    def __init__(self, scorer: Scorer, settings: GuidanceSettings | None = None, cache_dir: str | Path | None = None):
        self.scorer, self.settings = scorer, settings or GuidanceSettings()
        self.cache_dir = Path(cache_dir) if cache_dir else cache_home() / "guidance"
        self._parts = model_parts(scorer.model, scorer.processing_class)

    def build(self, rows: Dataset) -> list[Guidance]:
        """One reference answer a row, from the cache where it is there; every process has to call it.

        Args:
            rows: the forget set. What a row's answer must not say are its `private` texts, or its completion where it
                has no such column.

        Raises:
            ValueError: where the fall-back states what is private.
        """
        private = private_texts(rows, self.settings)
        _check_fallback(self.settings.fallback, private)
        kept = self._kept(rows, private)
        state = PartialState()
        # The main process decides for all: on another machine the file may be another or missing.
        (known,) = broadcast_object_list([kept.load(tell_of_nearest=True) if state.is_main_process else None])
        done = [Guidance(**fields) for fields in known or ()]
        if done:
            logger.info("Reference answers of %d of %d rows: %s", len(done), len(rows), kept.path)
        size, has_room = self.scorer.batch_size * BATCHES_AT_ONCE, state.is_main_process
        with tqdm(total=len(rows), initial=len(done), desc="Reference answers") as bar:
            for start in range(len(done), len(rows), size):
                numbers = range(start, min(start + size, len(rows)))
                done += self._ask([rows[i] for i in numbers], [private[i] for i in numbers])
                has_room = has_room and kept.save([asdict(guidance) for guidance in done])
                bar.update(len(numbers))
        state.wait_for_everyone()
        _tell(done)
        return done

    def _ask(self, rows: Sequence[Mapping[str, Any]], private: Sequence[Sequence[str]]) -> list[Guidance]:
        """Ask with one template after the other those rows that have no answer yet."""
        found: list[Guidance | None] = [None] * len(rows)
        for number, template in enumerate(self.settings.templates):
            waiting = [i for i, best in enumerate(found) if best is None or best.rejected]
            asked = [{**rows[i], "prompt": guided_prompt(rows[i]["prompt"], template)} for i in waiting]
            answers = self.scorer.generate(asked, self.settings.max_new_tokens) if asked else []
            for i, answer in zip(waiting, answers, strict=True):
                found[i] = self._better(found[i], self._judged(answer.strip(), number, private[i]))
        fallback = self.settings.fallback
        return [g if g.rejected in (None, "refusal") else Guidance(fallback, None, g.rejected) for g in found]

    def _judged(self, answer: str, template: int, private: Sequence[str]) -> Guidance:
        length = len(self.scorer.tokenizer(answer, add_special_tokens=False)["input_ids"])
        is_cut = length >= self.settings.max_new_tokens
        whole = whole_sentences(answer) if is_cut else answer
        return Guidance(whole or answer, template, fault_of(whole or answer, private, is_cut and whole is None))

    @staticmethod
    def _better(old: Guidance | None, new: Guidance) -> Guidance:
        order = (None, *REASONS)
        return new if old is None or order.index(new.rejected) < order.index(old.rejected) else old

    def _kept(self, rows: Dataset, private: Sequence[Sequence[str]]) -> KeptItems:
        parts = {
            **self._parts,
            "rows": rows_fingerprint(rows),
            "private texts": _digest([list(texts) for texts in private]),
            "settings": _digest(asdict(self.settings)),
        }
        return KeptItems(self.cache_dir, "reference answers", parts)


def private_texts(rows: Dataset, settings: GuidanceSettings) -> list[list[str]]:
    """What the answer to each row must not say: what is private in it, and the facts of the settings."""
    column = "private" if "private" in rows.column_names else "completion"
    texts = rows.select_columns(["prompt", column])
    return [[*private_of(row, column, settings.private_words), *settings.facts] for row in texts]


def has_guidance(rows: Dataset) -> bool:
    """Whether every row has a reference answer."""
    return COLUMN in rows.column_names and all(isinstance(text, str) and text.strip() for text in rows[COLUMN])


def put_in(rows: Dataset, answers: Sequence[Guidance], settings: GuidanceSettings) -> Dataset:
    """The rows with `guidance`, `guidance_prompt` (null for a fall-back) and `guidance_rejected`."""
    prompts = [
        None if g.template is None else guided_prompt(prompt, settings.templates[g.template])
        for g, prompt in zip(answers, rows["prompt"], strict=True)
    ]
    columns = {
        COLUMN: [g.answer for g in answers],
        PROMPT_COLUMN: prompts,
        REASON_COLUMN: [g.rejected for g in answers],
    }
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def reason_counts(answers: Sequence[Guidance]) -> dict[str, int]:
    """How many rows have an answer that will do, a refusal because nothing better came, or the fall-back, and why.

    Example:
        >>> reason_counts([Guidance("a hat", 0, None), Guidance("-", None, "private"), Guidance("No!", 0, "refusal")])
        {'accepted': 1, 'fall-back, private': 1, 'refusal kept': 1}
    """
    counts = Counter(
        "accepted" if g.rejected is None else "refusal kept" if g.template is not None else f"fall-back, {g.rejected}"
        for g in answers
    )
    return dict(sorted(counts.items()))


def _tell(answers: Sequence[Guidance]) -> None:
    counts = reason_counts(answers)
    says_little = sum(g.rejected is not None for g in answers)
    level = logging.WARNING if says_little > MANY_REJECTED * len(answers) else logging.INFO
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    hint = " Try another template." if level == logging.WARNING else ""
    logger.log(level, "Reference answers: %s.%s", told, hint)


def _check_fallback(fallback: str, private: Sequence[Sequence[str]]) -> None:
    stating = [i for i, texts in enumerate(private) if fault_of(fallback, texts) == "private"]
    if stating:
        raise ValueError(
            f"The fallback {fallback!r} states what is private in {len(stating)} rows, the first: row {stating[0]} "
            f"({', '.join(private[stating[0]])}). Choose another one."
        )


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=DIGEST_BYTES).hexdigest()
