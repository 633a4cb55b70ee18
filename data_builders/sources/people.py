"""Questions about people whom a model is to forget or to keep, in one form for MLLMU-Bench, CLEAR and TOFU.

A question is asked with the person's portrait (`vqa`) or by name in text alone (`qa`). From them come training sets in
the schema's columns: what MMUnlearner (arXiv 2502.11051) calls

    forget set        D_f = VQA about the forgotten people C_f
    retain set        D_r = VQA about the others, C_r
    preserve set (6)  P   = text QA about C_f  +  VQA about C_r  +  text QA about C_r
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows, StoredPicture

MODALITIES = ("vqa", "qa")
FORMS = ("choice", "generation", "cloze")
# Parts of the preserve set, in the order of eq. 6.
PRESERVE_PARTS = ("forget_qa", "retain_vqa", "retain_qa")


@dataclass(frozen=True)
class Question:
    """One question about a person.

    Attributes:
        source: the benchmark.
        id: unique within a configuration.
        person: whom it is about, by id or name; None where the set does not say.
        form: `choice` (of options), `generation` (in own words), `cloze` (a blank to fill in).
        question: its words; of a cloze question with the blank as published.
        answer: the right answer; of a choice the right option's text.
        options: of a choice, all options in their order.
        label: of a choice, the place of the right option.
        picture: the portrait, None for text.
        paraphrased: the right answer in other words, None where there is none.
        wrong: wrong answers in the same form (TOFU's perturbed answers).
    """

    source: str
    id: str
    person: str | None
    form: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    label: int | None = None
    picture: StoredPicture | None = None
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()

    @property
    def modality(self) -> str:
        """`vqa` with a picture, `qa` without."""
        return "qa" if self.picture is None else "vqa"


def to_rows(questions: Iterable[Question], chat: bool = True, **columns: Any) -> PicturedRows:
    """Training rows: each question with its right answer.

    Args:
        questions: of any form; of a choice the answer is the right option's text.
        chat: as chat messages, which the model's template renders; otherwise as plain text, "Question: ... Answer:".
        columns: further columns, the same in every row.

    Returns:
        Rows with `prompt`, `completion`, `images` where there is a portrait, `source`, `source_id` and `person`.
    """
    questions = list(questions)
    rows = [
        {
            **prompt_and_completion(question.question, question.answer, chat),
            "source": question.source,
            "source_id": question.id,
            "person": question.person,
            **columns,
        }
        for question in questions
    ]
    return PicturedRows(rows, [question.picture for question in questions])


def prompt_and_completion(question: str, answer: str, chat: bool) -> dict[str, Any]:
    """`prompt` and `completion` of a row, as chat messages or as plain text."""
    if not chat:
        return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def method_sets(
    forget: Sequence[Question], retain: Sequence[Question], chat: bool = True
) -> dict[str, list[PicturedRows]]:
    """The forget, retain and preserve set of MMUnlearner.

    Args:
        forget: all questions about the people to forget, with and without portraits.
        retain: all questions about the others.
        chat: as for `to_rows`.

    Returns:
        By name (`forget`, `retain`, `preserve`) the parts of the set; those of the preserve set carry a column `part`
        with one of `PRESERVE_PARTS`. A part that the questions lack is left out.

    Raises:
        ValueError: where there is no VQA to forget or to retain.
    """
    vqa, qa = (
        {name: [q for q in questions if q.modality == modality] for name, questions in (("f", forget), ("r", retain))}
        for modality in MODALITIES
    )
    if not vqa["f"] or not vqa["r"]:
        raise ValueError(
            f"MMUnlearner forgets and retains questions with portraits; there are {len(vqa['f'])} about the people to "
            f"forget and {len(vqa['r'])} about the others."
        )
    parts = zip(PRESERVE_PARTS, (qa["f"], vqa["r"], qa["r"]), strict=True)
    return {
        "forget": [to_rows(vqa["f"], chat)],
        "retain": [to_rows(vqa["r"], chat)],
        "preserve": [to_rows(questions, chat, part=part) for part, questions in parts if questions],
    }
