"""Multiple choice in MMLU's format: does the model still know the answer?

Two questions are put to the model. With the four answers listed, which letter does it expect ("A" to "D")? And without
them, which answer's text is likeliest per character? A small or badly calibrated model may know an answer and still not
follow the form with letters, so that the second number moves where the first stays at chance.

Source: Hendrycks et al. 2021, "Measuring massive multitask language understanding".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.eval.metrics import is_chosen, share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")
SPLIT = re.compile(r"_(dev|test|val)$")
ROWS_PER_QUESTION = 2 * len(LETTERS)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        subject: from the file's name, with spaces.
        text: the question.
        choices: the four answers.
        answer: place of the right one, 0 to 3.
    """

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoiceTask(Task):
    """`accuracy` (by letter) and `accuracy_text` (by the answer's text, per character), overall and by subject.

    `path` is a CSV file, or a folder with those of one split (`*_dev.csv`, `*_val.csv` or `*_test.csv`). No example
    questions stand in the prompt, and no chat template is used. Eight rows in a row belong to one question: four
    letters, four texts; an item's `index` is that of its first.
    """

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the questions, drawn evenly over subjects, and lay each out as eight rows."""
        questions = read_questions(path)
        chosen = draw_evenly([question.subject for question in questions], limit, self.name)
        self._questions = [questions[position] for position in chosen]
        return [row for question in self._questions for row in to_rows(question)]

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Score all letters and texts; there are no answers to generate."""
        scores = scorer.score(self.rows, desc=self.name, append_eos=False, max_length=scorer.context_length)
        items = []
        for number, question in enumerate(self._questions):
            first = number * ROWS_PER_QUESTION
            logps = [score.logp for score in scores[first : first + ROWS_PER_QUESTION]]
            by_letter = logps[: len(LETTERS)]
            by_text = [logp / len(text) for logp, text in zip(logps[len(LETTERS) :], question.choices, strict=True)]
            chosen = by_letter.index(max(by_letter))
            items.append(
                {
                    "index": first,
                    "kind": question.subject,
                    "prompt": question.text,
                    "expected": _option(question, question.answer),
                    "answer": _option(question, chosen),
                    "correct": is_chosen(by_letter, question.answer),
                    "correct_text": is_chosen(by_text, question.answer),
                    "logp_completion": by_letter[question.answer],
                    "logps_letters": by_letter,
                    "logps_per_character": by_text,
                }
            )
        return items

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Shares, overall and by subject; the baseline is not needed."""
        subjects = sorted({item["kind"] for item in items})
        groups = {subject: _metrics([item for item in items if item["kind"] == subject]) for subject in subjects}
        return TaskResult(_metrics(items), groups)


def read_questions(path: str | Path) -> list[Question]:
    """Read MMLU's CSV files.

    Two forms are read: the original one without a header, whose answers are letters, and that with a header
    (`question`, four choices, `answer`), whose answers are letters or places counted from 0.

    Args:
        path: a file, or a folder with one file a subject, all of one split.

    Raises:
        FileNotFoundError: where a folder holds no CSV file.
        ValueError: where a folder holds several splits, or listing all faulty rows with file and row.
    """
    path = Path(path).expanduser()
    faults, questions = Faults(str(path)), []
    for file in _files(path):
        found = _read_file(file, faults)
        if not found:
            faults.add("it has no questions", file.name)
        questions += found
    faults.raise_if_any()
    return [question for question in questions if question is not None]


def to_rows(question: Question) -> list[dict[str, Any]]:
    """The rows of one question: the letters after the list of answers, then the texts after the bare question."""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    subject = f" about {question.subject}" if question.subject else ""
    head = f"The following are multiple choice questions (with answers){subject}.\n\n{question.text}\n"
    by_letter = {"prompt": f"{head}{listed}\nAnswer:", "source": "multiple_choice"}
    bare = {
        "prompt": f"The following are questions (with answers){subject}.\n\nQuestion: {question.text}\nAnswer:",
        "source": "multiple_choice",
    }
    rows = [{**by_letter, "completion": f" {letter}"} for letter in LETTERS]
    return rows + [{**bare, "completion": f" {choice}"} for choice in question.choices]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.csv"))
    if not files:
        inside = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir())) or "none"
        raise FileNotFoundError(f"{path} holds no .csv file; name a file, or the folder of one split (here: {inside}).")
    splits = {match.group(1) if (match := SPLIT.search(file.stem)) else "" for file in files}
    if len(splits) > 1:
        names = ", ".join(sorted(split or "none" for split in splits))
        raise ValueError(
            f"{path} holds files of several splits ({names}). Measure one: put each in a folder of its own, or name "
            "one file."
        )
    return files


def _read_file(file: Path, faults: Faults) -> list[Question | None]:
    """The questions of a file in order, None for a faulty one."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            records = list(csv.reader(handle, strict=True))
    except (UnicodeDecodeError, csv.Error) as err:
        faults.add(f"cannot be read as CSV in UTF-8: {err}", file.name)
        return [None]
    has_header = bool(records) and len(records[0]) == len(COLUMNS) and _is_header(records[0])
    answers = (*LETTERS, *map(str, range(len(LETTERS)))) if has_header else tuple(LETTERS)
    subject = SPLIT.sub("", file.stem).replace("_", " ")
    questions: list[Question | None] = []
    for number, record in enumerate(records[has_header:], start=1):
        if not record:
            continue
        fault = _fault(record, answers)
        if fault:
            faults.add(fault, f"{file.name}, row {number}")
            questions.append(None)
        else:
            text, *choices, answer = (cell.strip() for cell in record)
            questions.append(Question(subject, text, tuple(choices), answers.index(answer) % len(LETTERS)))
    return questions


def _is_header(record: Sequence[str]) -> bool:
    return record[0].strip().lower() == "question" and record[-1].strip().lower() == "answer"


def _fault(record: Sequence[str], answers: Sequence[str]) -> str | None:
    """What is wrong with a row, or None."""
    if len(record) != len(COLUMNS):
        return f"{len(record)} columns, expected {len(COLUMNS)}: {', '.join(COLUMNS)}"
    empty = [column for column, cell in zip(COLUMNS, record, strict=True) if not cell.strip()]
    if empty:
        return f"{', '.join(empty)} is empty"
    if record[-1].strip() not in answers:
        return f"the answer is {record[-1]!r:.40}, expected one of {', '.join(answers)}"
    return None


def _option(question: Question, place: int) -> str:
    return f"{LETTERS[place]}. {question.choices[place]}"


def _metrics(items: Sequence[Item]) -> dict[str, MetricValue]:
    return {
        "accuracy": share([item["correct"] for item in items]),
        "accuracy_text": share([item["correct_text"] for item in items]),
    }
