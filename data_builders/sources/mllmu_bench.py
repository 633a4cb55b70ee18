"""MLLMU-Bench (Liu et al. 2024, arXiv 2410.22108): questions about 500 made-up people and 153 celebrities.

Published as `MLLMMU/MLLMU-Bench` on the Hub, a folder of Parquet for each configuration, split `train`:

| configuration                           | people                                | pictures                    |
|-----------------------------------------|---------------------------------------|-----------------------------|
| `forget_5`, `forget_10`, `forget_15`    | to forget                             | `image`                     |
| `retain_95`, `retain_90`, `retain_85`   | to keep                               | `image`                     |
| `Full_Set`                              | all 500                               | `image`                     |
| `Test_Set`                              | all 500, drawn anew                   | `images`, several a person  |
| `Retain_Set`                            | celebrities (the real-world set)      | `image`                     |
| `ft_Data`                               | all 500, for fine-tuning              | `image`                     |

All but `ft_Data` have `ID` and three columns of questions:

    Classification_Task  {"Image_Textual_Questions": [Q], "Pure_Text_Questions": [Q]},
                         Q = {"Question", "Options": {"A", "B", "C", "D"}, "Correct_Answer": "A"}
    Generation_Task      [{"Type": "Image_Textual" or "Pure_Text", "Question", "Ground_Truth"}]
    Mask_Task            the same, with the blank written __ in "Question"

`ft_Data` has `image`, `ID` and `metadata`, JSON text of [{"Question", "Answer"}]; a forget or retain configuration with
a column `metadata` (the authors' split of it) is read in the same way. Where this was found: the dataset card on the
Hub, and `eval.py` and `data_process/data_preprocess.py` of the authors' code. The card names no licence.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.people import Question
from biasunlearn_trainer.data_builders.sources.pictured_rows import StoredPicture, check_pictures, picture_table
from biasunlearn_trainer.data_builders.sources.published import (
    config_name,
    load_config,
    missing_columns,
    sibling,
    text_rows,
)

SOURCE = "mllmu_bench"
TASK_COLUMNS = ("Classification_Task", "Generation_Task", "Mask_Task")
TYPES = {"Image_Textual": True, "Pure_Text": False}
TEST_SET, FINETUNING_SET = "Test_Set", "ft_Data"
FORGET = re.compile(r"forget_(\d+)")


def read_questions(path: str | os.PathLike, people: Sequence[str] | None = None) -> list[Question]:
    """Reads the questions of the three tasks.

    Args:
        path: ROOT/CONFIG, as in `published`.
        people: only about these, by ID; None for all.

    Returns:
        Of each person the choices, then the questions in own words, then those with a blank. Of several pictures of a
        person one is taken, always the same one.

    Raises:
        InvalidDataset: missing columns, a right answer that is no option, empty texts, unknown types, pictures that do
            not open: all together, each with its row.
        FileNotFoundError: there is no such configuration.
    """
    dataset, faults = load_config(path), Faults(str(path))
    missing_columns(dataset, ("ID", *TASK_COLUMNS), faults)
    column = _picture_column(dataset, faults)
    faults.raise_if_any()
    wanted, questions, pictures = None if people is None else set(people), [], {}
    table = picture_table(dataset, column)
    for number, (where, row) in enumerate(text_rows(dataset, ("image", "images"))):
        if wanted is not None and row["ID"] not in wanted:
            continue
        picture = pictures[where] = _picture(table, number, column, row["ID"])
        questions += [q for q in _questions_of(row, picture, where, faults) if q is not None]
    check_pictures(pictures, faults)
    if not questions and not faults.count:
        faults.add("it has no questions" + ("" if wanted is None else f" about the {len(wanted)} people asked for"))
    faults.raise_if_any()
    return questions


def read_test_questions(path: str | os.PathLike) -> list[Question]:
    """Reads the questions of `Test_Set` about the people of a forget configuration, as the authors' code does.

    Args:
        path: ROOT/forget_5 or another forget configuration; `Test_Set` is looked for beside it.
    """
    return read_questions(sibling(path, TEST_SET), read_people(path))


def read_people(path: str | os.PathLike) -> list[str]:
    """The IDs of a configuration's people."""
    dataset, faults = load_config(path), Faults(str(path))
    missing_columns(dataset, ("ID",), faults)
    faults.raise_if_any()
    return [str(value) for value in dataset["ID"]]


def read_training_questions(path: str | os.PathLike, people: Sequence[str] | None = None) -> list[Question]:
    """Reads what models are fine-tuned on, and unlearn: questions with portraits, answered in own words.

    Args:
        path: ROOT/ft_Data, or another configuration with a column `metadata`.
        people: only about these, by ID; None for all.

    Raises:
        InvalidDataset: as for `read_questions`; also where `metadata` is not the JSON text it should be.
    """
    dataset, faults = load_config(path), Faults(str(path))
    missing_columns(dataset, ("ID", "metadata", "image"), faults)
    faults.raise_if_any()
    wanted, questions, pictures = None if people is None else set(people), [], {}
    table = picture_table(dataset, "image")
    for number, (where, row) in enumerate(text_rows(dataset, ("image",))):
        if wanted is None or row["ID"] in wanted:
            pictures[where] = StoredPicture(table, number)
            questions += _fine_tuning_questions(row, pictures[where], where, faults)
    check_pictures(pictures, faults)
    missing = sorted(wanted - {q.person for q in questions}) if wanted and not faults.count else []
    if missing:
        faults.add(f"it has no questions about {len(missing)} of {len(wanted)} people, for instance {missing[0]}")
    faults.raise_if_any()
    return questions


def read_method_questions(path: str | os.PathLike, text_task: str = "choice") -> tuple[list[Question], list[Question]]:
    """What MMUnlearner needs: all questions about the people to forget, and all about the others.

    Args:
        path: ROOT/forget_5 or another forget configuration. VQA comes from its own `metadata` where it has one, or else
            from ROOT/ft_Data; text QA from the forget configuration and the retain configuration beside it.
        text_task: which text questions the preserve set takes: `choice` with the right option's text, as MMUnlearner's
            code; those are the very questions that forget QA and retain QA are measured by. `generation` keeps apart.

    Returns:
        Two lists for `people.method_sets`.
    """
    match = FORGET.fullmatch(config_name(path))
    if not match:
        raise ValueError(f"{path} is no forget configuration; expected ROOT/forget_5, forget_10 or forget_15.")
    if text_task not in ("choice", "generation"):
        raise ValueError(f"`text_task` must be choice or generation, got {text_task!r}.")
    both = []
    for config in (path, sibling(path, f"retain_{100 - int(match[1])}")):
        texts = [q for q in read_questions(config) if q.modality == "qa" and q.form == text_task]
        if "metadata" in load_config(config).column_names:
            pictured = read_training_questions(config)
        else:
            pictured = read_training_questions(sibling(path, FINETUNING_SET), read_people(config))
        both.append([*pictured, *texts])
    return both[0], both[1]


def _picture_column(dataset: Dataset, faults: Faults) -> str:
    found = [column for column in ("images", "image") if column in dataset.column_names]
    if not found:
        faults.add(f"no column image or images; columns found: {', '.join(dataset.column_names)}")
    return found[0] if found else ""


def _picture(table: Dataset, number: int, column: str, person: str) -> StoredPicture:
    if column == "image":
        return StoredPicture(table, number)
    # The authors draw one of a person's pictures at random; one that hangs on the ID alone is the same in every run.
    count = len(table[number].column(0)[0].as_py() or [])
    return StoredPicture(table, number, zlib.crc32(str(person).encode()) % max(1, count))


def _questions_of(
    row: Mapping[str, Any], picture: StoredPicture, where: str, faults: Faults
) -> Iterator[Question | None]:
    person = str(row["ID"])
    choices = row["Classification_Task"] or {}
    for name, pictured in (("Image_Textual_Questions", picture), ("Pure_Text_Questions", None)):
        if name not in choices:
            faults.add(f"Classification_Task lacks {name}; it has {', '.join(choices) or 'nothing'}", where)
        for number, item in enumerate(choices.get(name) or [], start=1):
            yield _choice(item, person, f"{name} {number}", pictured, where, faults)
    for column, form in (("Generation_Task", "generation"), ("Mask_Task", "cloze")):
        for number, item in enumerate(row[column] or [], start=1):
            yield _written(item, person, form, f"{column} {number}", picture, where, faults)


def _choice(
    item: Mapping[str, Any], person: str, name: str, picture: StoredPicture | None, where: str, faults: Faults
) -> Question | None:
    # Arrow gives every item all letters of the column; a question with fewer has None there.
    options = {letter: text for letter, text in (item.get("Options") or {}).items() if text is not None}
    right, text = item.get("Correct_Answer"), (item.get("Question") or "").strip()
    place = f"{where}, {name}"
    if not text:
        faults.add("Question is empty", place)
    elif len(options) < 2:
        faults.add(f"expected at least two Options, got {options!r:.80}", place)
    elif right not in options:
        faults.add(f"Correct_Answer is {right!r:.40}, expected one of {', '.join(options)}", place)
    else:
        letters = sorted(options)
        texts = tuple(str(options[letter]).strip() for letter in letters)
        label = letters.index(right)
        identity = f"{person}/{name}"
        return Question(SOURCE, identity, person, "choice", text, texts[label], texts, label, picture)
    return None


def _written(
    item: Mapping[str, Any], person: str, form: str, name: str, picture: StoredPicture, where: str, faults: Faults
) -> Question | None:
    place, kind = f"{where}, {name}", item.get("Type")
    texts = [(item.get(key) or "").strip() for key in ("Question", "Ground_Truth")]
    if kind not in TYPES:
        faults.add(f"Type is {kind!r:.40}, expected one of {', '.join(TYPES)}", place)
    elif not all(texts):
        faults.add(f"{'Ground_Truth' if texts[0] else 'Question'} is empty", place)
    elif form == "cloze" and "__" not in texts[0]:
        faults.add(f"no blank (__) in {texts[0]!r:.80}", place)
    else:
        return Question(SOURCE, f"{person}/{name}", person, form, *texts, picture=picture if TYPES[kind] else None)
    return None


def _fine_tuning_questions(
    row: Mapping[str, Any], picture: StoredPicture, where: str, faults: Faults
) -> list[Question]:
    try:
        items = json.loads(row["metadata"])
        texts = [(item["Question"].strip(), item["Answer"].strip()) for item in items]
    except (TypeError, ValueError, KeyError, AttributeError):
        faults.add(f"metadata is no JSON list of Question and Answer: {row['metadata']!r:.80}", where)
        return []
    person = str(row["ID"])
    return [
        Question(SOURCE, f"{person}/metadata {number}", person, "generation", *pair, picture=picture)
        for number, pair in enumerate(texts, start=1)
        if all(pair)
    ]
