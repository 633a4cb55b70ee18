"""CLEAR (Dontsov et al. 2024, arXiv 2410.18057): portraits and captions of TOFU's 200 made-up authors.

Published as `therem/CLEAR` on the Hub, a folder of Parquet for each configuration, split `train`:

| configuration                                              | columns                                              |
|------------------------------------------------------------|------------------------------------------------------|
| `forget01`, `05`, `10`, `retain99`, `95`, `90`, `full`     | `image`, `caption`, `name`                           |
| the same with `+tofu`                                      | `image`, `caption`, `question`, `answer`: captions,  |
|                                                            | and TOFU's text QA, whose `image` is null            |
| `forget01_perturbed`, ..., `retain_perturbed`              | `image`, `caption`, `name`, `paraphrased_caption`,   |
|                                                            | `perturbed_captions`, `perturbed_names` (lists)      |
| `real_faces`                                               | `image`, `answer`, `options` (list of wrong names)   |
| `real_world`                                               | `image`, `question`, `answer`, `options`             |

Where this was found: the dataset card on the Hub and its history, `mm/dataset.py` and `config/mm/eval.yaml` of the
authors' code, and `CLEAR_eval.py` of MMUnlearner's. The card names no licence; TOFU, whose text it holds, is MIT.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

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

SOURCE = "clear"
# One of the nine wordings that the authors draw from; a fixed one makes two evaluations comparable.
CAPTION_QUESTION = "What can you see in this picture?"
NAME_QUESTION = "What is the name of the person in the image?"
FORGET = re.compile(r"forget(\d\d)")


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Reads a configuration's questions.

    Args:
        path: ROOT/CONFIG, as in `published`.

    Returns:
        Row by row. A captioned picture asks for its caption in own words (`generation`), with paraphrased and wrong
        captions where the set has them; where it has wrong names, for the name, as a choice among them. A row without a
        picture is TOFU's question. A row with `options` is a choice. The order of options hangs on the row alone.

    Raises:
        InvalidDataset: missing columns, empty texts, pictures that do not open: all together, each with its row.
        FileNotFoundError: there is no such configuration.
    """
    dataset, faults = load_config(path), Faults(str(path))
    columns = set(dataset.column_names)
    needed = ("answer", "options") if "options" in columns else ("image", "caption")
    if missing_columns(dataset, needed, faults):
        faults.raise_if_any()
    config, questions, pictures = config_name(path), [], {}
    table = picture_table(dataset, "image") if "image" in columns else None
    for number, (where, row) in enumerate(text_rows(dataset, ("image",))):
        picture = StoredPicture(table, number) if table is not None else None
        # Text rows of the mixed configurations have a question and no caption; their picture is null.
        if picture is not None and (row.get("question") is None or picture.stored is not None):
            pictures[where] = picture
        else:
            picture = None
        make = _choices if "options" in columns else _captions if picture is not None else _texts
        questions += make(row, picture, f"{config}/{number}", where, faults)
    check_pictures(pictures, faults)
    if not questions and not faults.count:
        faults.add("it has no rows")
    faults.raise_if_any()
    return questions


def read_method_questions(path: str | os.PathLike) -> tuple[list[Question], list[Question]]:
    """What MMUnlearner needs: captions of, and text QA about, the people to forget; and the others.

    Args:
        path: ROOT/forget05 or another forget configuration; the retain configuration and both with `+tofu` are looked
            for beside it.

    Returns:
        Two lists for `people.method_sets`.
    """
    match = FORGET.fullmatch(config_name(path))
    if not match:
        raise ValueError(f"{path} is no forget configuration; expected ROOT/forget01, forget05 or forget10.")
    both = []
    for config in (match[0], f"retain{100 - int(match[1])}"):
        captions = read_questions(sibling(path, config))
        texts = [q for q in read_questions(sibling(path, f"{config}+tofu")) if q.modality == "qa"]
        both.append([*captions, *texts])
    return both[0], both[1]


def _captions(
    row: Mapping[str, Any], picture: StoredPicture, identity: str, where: str, faults: Faults
) -> Iterator[Question]:
    caption, name = (row.get("caption") or "").strip(), (row.get("name") or "").strip() or None
    if not caption:
        faults.add("caption is empty", where)
        return
    paraphrased = row.get("paraphrased_caption") or None
    wrong = tuple(row.get("perturbed_captions") or ())
    yield Question(
        SOURCE,
        f"{identity}/caption",
        name,
        "generation",
        CAPTION_QUESTION,
        caption,
        picture=picture,
        paraphrased=paraphrased,
        wrong=wrong,
    )
    if "perturbed_names" in row:
        if name is None or not row["perturbed_names"]:
            faults.add("perturbed_names need a name and at least one other", where)
            return
        yield _choice(NAME_QUESTION, name, row["perturbed_names"], name, picture, f"{identity}/name")


def _texts(row: Mapping[str, Any], picture: None, identity: str, where: str, faults: Faults) -> Iterator[Question]:
    texts = [(row.get(column) or "").strip() for column in ("question", "answer")]
    if all(texts):
        yield Question(SOURCE, identity, None, "generation", *texts)
    else:
        faults.add(f"{'answer' if texts[0] else 'question'} is empty, and there is no picture", where)


def _choices(
    row: Mapping[str, Any], picture: StoredPicture | None, identity: str, where: str, faults: Faults
) -> Iterator[Question]:
    answer = (row.get("answer") or "").strip()
    others = [text for text in row.get("options") or [] if text and text.strip() != answer]
    if not answer or not others:
        faults.add(f"expected an answer and other options, got {answer!r} and {row.get('options')!r:.80}", where)
        return
    question = (row.get("question") or "").strip() or NAME_QUESTION
    yield _choice(question, answer, others, None, picture, identity)


def _choice(
    question: str, answer: str, others: list[str], person: str | None, picture: StoredPicture | None, identity: str
) -> Question:
    options = [answer, *(text.strip() for text in others)]
    random.Random(identity).shuffle(options)
    return Question(
        SOURCE, identity, person, "choice", question, answer, tuple(options), options.index(answer), picture
    )
