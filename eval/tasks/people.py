"""What MLLMU-Bench, CLEAR and TOFU have in common: questions about people, by portrait and by name.

A question can be asked in four ways, of which a task names those that it uses for each form of question:

- `letters`: the options are listed, and the likeliest letter is the choice;
- `written`: the model writes; a choice counts by its first letter, a cloze by whether it contains the answer;
- `rouge`: the model writes, and ROUGE-L compares with the right answer;
- `likelihood`: how likely are the right, the paraphrased and the wrong answers?
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from biasunlearn_trainer.data_builders.sources.people import Question, prompt_and_completion
from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows
from biasunlearn_trainer.data_builders.sources.published import config_name
from biasunlearn_trainer.eval.metrics import contains_answer, is_chosen, rouge_l, written_letter
from biasunlearn_trainer.eval.metrics.choice import LETTERS
from biasunlearn_trainer.eval.metrics.written import rouge_scorer
from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly
from biasunlearn_trainer.models import tokenizer_of

# MLLMU-Bench and CLEAR let models write 50 tokens; TOFU 200 in all.
MAX_NEW_TOKENS = 50
LETTER_REQUEST = "Just give ONE letter representing the answer directly."


@dataclass(frozen=True)
class Asked:
    """A question put to the model in one way, as rows `first` to `first + count - 1` of the task."""

    question: Question
    set_name: str
    way: str
    first: int
    count: int


class PeopleTask(Task):
    """Questions about people; a subclass says where they come from, how they are asked and what is made of it.

    Rows are chat messages, which the model's own template renders; for a model without one they are plain text,
    "Question: ... Answer:".

    Attributes:
        ways: of each form of question the ways in which it is asked; forms that are not named are left out.
        max_new_tokens: longest written answer.
        forgets: whether the configuration is one to forget, by its name.
    """

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    max_new_tokens: ClassVar[int] = MAX_NEW_TOKENS

    @abc.abstractmethod
    def read(self, path: str) -> Mapping[str, Sequence[Question]]:
        """Read the questions by the name of their set."""

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the questions, drawn evenly over sets, forms and modalities, and lay them out."""
        if any("rouge" in ways for ways in self.ways.values()):
            try:
                rouge_scorer()
            except ImportError as err:
                raise ValueError(str(err)) from err
        self.forgets = config_name(path).startswith("forget")
        found = [(name, q) for name, questions in self.read(path).items() for q in questions if q.form in self.ways]
        if not found:
            raise ValueError(f"{path} has no questions of the form {', '.join(self.ways)}, which {self.name!r} asks.")
        groups = [(name, q.form, q.modality) for name, q in found]
        self._asked, self._texts, pictures = [], [], []
        for position in draw_evenly(groups, limit, self.name):
            set_name, question = found[position]
            for way, texts in self._layouts(question):
                self._asked.append(Asked(question, set_name, way, len(self._texts), len(texts)))
                self._texts += texts
                pictures += [question.picture] * len(texts)
        self._pictures = pictures
        return self._rows(chat=True)

    def _layouts(self, question: Question) -> list[tuple[str, list[tuple[str, str]]]]:
        """The ways in which a question is asked, each with the prompts and completions of its rows."""
        prompt = self.prompt(question)
        layouts = []
        for way in self.ways[question.form]:
            if way == "letters":
                texts = [(prompt, letter) for letter in LETTERS[: len(question.options)]]
            elif way == "likelihood":
                right = [question.answer] + ([question.paraphrased] if question.paraphrased else [])
                texts = [(prompt, text) for text in (*right, *question.wrong)]
            else:
                texts = [(prompt, question.answer if question.label is None else LETTERS[question.label])]
            layouts.append((way, texts))
        return layouts

    def prompt(self, question: Question) -> str:
        """What the model is asked."""
        if question.form == "choice":
            listed = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, question.options, strict=False))
            return f"{question.question}\n{listed}\n{LETTER_REQUEST}"
        return question.question

    def _rows(self, chat: bool) -> PicturedRows:
        rows = [prompt_and_completion(prompt, answer, chat) for prompt, answer in self._texts]
        return PicturedRows(rows, self._pictures)

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Score what is scored and generate what is written; nothing more is generated for case studies."""
        has_template = getattr(tokenizer_of(scorer.processing_class), "chat_template", None) or getattr(
            scorer.processing_class, "chat_template", None
        )
        rows = self.rows if has_template else self._rows(chat=False)
        scored = [
            row
            for asked in self._asked
            if asked.way != "written"
            for row in range(asked.first, asked.first + asked.count)
        ]
        scores = dict(zip(scored, scorer.score(rows.take(scored), desc=self.name), strict=True)) if scored else {}
        written = [asked.first for asked in self._asked if asked.way in ("written", "rouge")]
        texts = scorer.generate(rows.take(written), self.max_new_tokens, desc=f"{self.name} answers") if written else []
        told = dict(zip(written, texts, strict=True))
        return [
            self._record(asked, [scores.get(asked.first + i) for i in range(asked.count)], told.get(asked.first))
            for asked in self._asked
        ]

    def _record(self, asked: Asked, scores: Sequence[CompletionScore | None], written: str | None) -> Item:
        question = asked.question
        item = {
            "index": asked.first,
            "id": question.id,
            "kind": f"{question.modality}_{question.form}",
            "way": asked.way,
            "set": asked.set_name,
            "person": question.person,
            "prompt": self._texts[asked.first][0],
            "expected": question.answer,
            "rejected": None,
            "answer": written.strip() if written is not None else None,
        }
        return item | getattr(self, f"_{asked.way}")(question, scores, item["answer"])

    def _letters(self, question: Question, scores: Sequence[CompletionScore], _: None) -> Item:
        logps = [score.logp for score in scores]
        return {
            "answer": question.options[logps.index(max(logps))],
            "correct": is_chosen(logps, question.label),
            "num_options": len(logps),
            "logp_completion": logps[question.label],
            "logps": logps,
        }

    def _written(self, question: Question, _: Sequence, answer: str) -> Item:
        if question.form == "choice":
            place = written_letter(answer, len(question.options))
            return {"correct": place == question.label, "num_options": len(question.options), "choice": place}
        return {"correct": contains_answer(answer, question.answer)}

    def _rouge(self, question: Question, scores: Sequence[CompletionScore], answer: str) -> Item:
        score = rouge_l(answer, question.answer)
        return {"rouge_l_recall": score.recall, "rouge_l_f1": score.f1, "logp_completion": scores[0].logp}

    def _likelihood(self, question: Question, scores: Sequence[CompletionScore], _: None) -> Item:
        means = [score.logp / score.num_tokens for score in scores]
        num_right = 2 if question.paraphrased else 1
        return {
            "correct": scores[0].is_greedy,
            "logp_completion": scores[0].logp,
            "mean_logp": means[0],
            "mean_logp_paraphrased": means[1] if question.paraphrased else None,
            "mean_logps_wrong": means[num_right:],
        }


def of_kind(items: Sequence[Item], kind: str, *ways: str) -> list[Item]:
    """The records of a kind (`vqa_choice`, ...) that were asked in one of some ways."""
    return [item for item in items if item["kind"] == kind and item["way"] in ways]
