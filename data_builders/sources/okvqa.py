"""OK-VQA (Marino, Rastegari, Farhadi and Mottaghi, CVPR 2019): questions about pictures that need outside knowledge.

Read are the publishers' files, in VQA's layout, with MS COCO's pictures beside them:

    OpenEnded_mscoco_val2014_questions.json   {"questions": [{"image_id", "question", "question_id"}], ...}
    mscoco_val2014_annotations.json           {"annotations": [{"question_id", "image_id", "answers": [{"answer",
                                              "raw_answer", "answer_confidence", "answer_id"}], ...}], ...}
    val2014/COCO_val2014_000000000042.jpg

or the Hub set lmms-lab/OK-VQA and its like: columns `image`, `question`, `question_id`, `answers` (texts, or
dictionaries as above). MS COCO's terms: annotations are CC BY 4.0, the pictures are their photographers' under the
terms of Flickr, so that sets with them cannot be passed on. They are what a model knows of pictures,
apart from any bias.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from biasunlearn_trainer.data_builders.images import image_fault, picture_file
from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.pictured_rows import StoredPicture, check_pictures, picture_table
from biasunlearn_trainer.data_builders.sources.published import load_config, missing_columns, text_rows

QUESTIONS, ANNOTATIONS = "OpenEnded_mscoco_{split}_questions.json", "mscoco_{split}_annotations.json"
LICENCE = "questions not stated, annotations of MS COCO CC BY 4.0; no redistribution of the pictures, which others own"
PROMPT = "Question: {question} Answer:"


def okvqa_rows(
    path: str, *, split: Literal["val2014", "train2014"] = "val2014", prompt: str = PROMPT, pictures: str | None = None
) -> Iterator[dict]:
    """A row a question, answered by the answer that most people gave.

    Args:
        path: a folder with the publishers' files; or OWNER/NAME/SPLIT on the Hub, a folder of Parquet, a Parquet file.
        split: of the publishers' files; the others name theirs in the path.
        prompt: how the question is put; it holds {question}.
        pictures: of the publishers' files, the folder of MS COCO's pictures (by default PATH/SPLIT); of the others,
            where their pictures are written to (by default in the cache of `datasets`).

    Raises:
        FileNotFoundError, ConnectionError: nothing is there.
        InvalidDataset: all faults, also of pictures: every one is decoded once.
        ValueError: a prompt without its slot.
    """
    if prompt.count("{question}") != 1:
        raise ValueError(f"`prompt` must hold {{question}} once, got {prompt!r}.")
    folder = Path(path).expanduser()
    if (folder / QUESTIONS.format(split=split)).is_file():
        read = _read_published(folder, split, Path(pictures).expanduser() if pictures else folder / split)
    else:
        read = _read_table(path, Path(pictures).expanduser() if pictures else None)
    for number, question, answers, picture in read:
        yield {
            "prompt": prompt.replace("{question}", question.strip()),
            "completion": f" {Counter(answers).most_common(1)[0][0].strip()}",
            "images": [picture],
            "polarity": "unrelated",
            "pair_id": f"okvqa-{number}",
            "source": "okvqa",
            "source_id": str(number),
            "kind": "perception",
            "answers": answers,
        }


Question = tuple[str, str, list[str], str]
"""Id, question, answers, path of the picture."""


def _read_published(folder: Path, split: str, pictures: Path) -> list[Question]:
    faults = Faults(str(folder / QUESTIONS.format(split=split)))
    questions = _list_in(folder / QUESTIONS.format(split=split), "questions", faults)
    annotations = _list_in(folder / ANNOTATIONS.format(split=split), "annotations", faults)
    faults.raise_if_any()
    answers_of = {note.get("question_id"): note.get("answers") for note in annotations if isinstance(note, dict)}
    found, looked_at = [], {}
    for number, item in enumerate(questions, start=1):
        where = f"question {number}"
        try:
            image = pictures / f"COCO_{split}_{item['image_id']:012d}.jpg"
            number, question = item["question_id"], item["question"]
        except (KeyError, TypeError, ValueError) as err:
            faults.add(f"expected image_id (a number), question and question_id, got {item!r:.80} ({err!r})", where)
            continue
        answers = _answers(answers_of.get(number), where, faults)
        _check_question(question, where, faults)
        if image not in looked_at:
            looked_at[image] = image_fault(image)
            if looked_at[image]:
                faults.add(looked_at[image], where)
        found.append((str(number), question, answers, str(image.absolute())))
    faults.raise_if_any()
    return found


def _list_in(file: Path, key: str, faults: Faults) -> list:
    if not file.is_file():
        faults.add(f"there is no {file}")
        return []
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as err:
        faults.add(f"{file.name} is no JSON: {err}")
        return []
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or not values:
        faults.add(f"{file.name} has no list `{key}`")
        return []
    return values


def _answers(value: Any, where: str, faults: Faults) -> list[str]:
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in value or []]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        faults.add(f"expected a list of answers, got {value!r:.80}", where)
    return answers


def _check_question(question: Any, where: str, faults: Faults) -> None:
    if not isinstance(question, str) or not question.strip():
        faults.add(f"`question` must be a text, got {question!r:.60}", where)


def _read_table(path: str, folder: Path | None) -> Iterator[Question]:
    dataset = load_config(path)
    faults = Faults(str(path))
    if missing_columns(dataset, ("image", "question", "question_id", "answers"), faults):
        faults.raise_if_any()
    rows = list(text_rows(dataset, ("image",)))
    table = picture_table(dataset, "image")
    stored = {where: StoredPicture(table, number) for number, (where, _) in enumerate(rows)}
    answers = [_answers(row["answers"], where, faults) for where, row in rows]
    for where, row in rows:
        _check_question(row["question"], where, faults)
    check_pictures(stored, faults)
    faults.raise_if_any()
    for (where, row), several in zip(rows, answers, strict=True):
        yield str(row["question_id"]), row["question"], several, picture_file(stored[where].stored, folder)
