"""TOFU (Maini et al. 2024, arXiv 2401.06121; MIT): 4,000 questions about 200 made-up authors, in text.

Published as `locuslab/TOFU` on the Hub, JSON Lines named CONFIG.json, split `train`:

| configuration                                                        | columns                                    |
|----------------------------------------------------------------------|--------------------------------------------|
| `forget01`, `05`, `10`, `retain99`, `95`, `90`, `full`               | `question`, `answer`                       |
| `forget01_perturbed`, ..., `retain_perturbed`                        | also `paraphrased_answer`,                 |
|                                                                      | `perturbed_answer` (a list of five)        |
| `real_authors_perturbed`, `world_facts_perturbed`                    | `question`, `answer`, `perturbed_answer`   |
|                                                                      | (a list of three)                          |

Where this was found: the dataset card on the Hub, and `config/eval_everything.yaml` and `data/` of the authors' code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.people import Question
from biasunlearn_trainer.data_builders.sources.published import (
    config_name,
    load_config,
    missing_columns,
    sibling,
    text_rows,
)

SOURCE = "tofu"
FORGET = re.compile(r"forget(\d\d)(_perturbed)?")
# What the authors evaluate a forget split on.
EVALUATION_SETS = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


def read_questions(path: str | os.PathLike) -> list[Question]:
    """Reads a configuration: questions to answer in own words, with wrong answers where it has them.

    Args:
        path: ROOT/CONFIG, as in `published`.

    Raises:
        InvalidDataset: missing columns, empty texts, no wrong answers in a column of them; all together.
        FileNotFoundError: there is no such configuration.
    """
    dataset, faults = load_config(path), Faults(str(path))
    missing_columns(dataset, ("question", "answer"), faults)
    faults.raise_if_any()
    config, questions = config_name(path), []
    for number, (where, row) in enumerate(text_rows(dataset, ())):
        texts = [(row[column] or "").strip() for column in ("question", "answer")]
        wrong = row.get("perturbed_answer", ())
        if not all(texts):
            faults.add(f"{'answer' if texts[0] else 'question'} is empty", where)
        elif not isinstance(wrong, list | tuple) or ("perturbed_answer" in row and not wrong):
            faults.add(f"perturbed_answer must be a list of wrong answers, got {wrong!r:.80}", where)
        else:
            paraphrased = row.get("paraphrased_answer") or None
            identity = f"{config}/{number}"
            questions.append(
                Question(SOURCE, identity, None, "generation", *texts, paraphrased=paraphrased, wrong=tuple(wrong))
            )
    faults.raise_if_any()
    return questions


def read_evaluation(path: str | os.PathLike) -> dict[str, list[Question]]:
    """Reads all four sets on which TOFU evaluates a forget split.

    Args:
        path: ROOT/forget10 or another forget configuration.

    Returns:
        By name: the forget set's perturbed questions, and `EVALUATION_SETS`.
    """
    match = FORGET.fullmatch(config_name(path))
    if not match:
        raise ValueError(f"{path} is no forget configuration; expected ROOT/forget01, forget05 or forget10.")
    names = (f"forget{match[1]}_perturbed", *EVALUATION_SETS)
    return {name: read_questions(sibling(path, name)) for name in names}


def retain_path(path: str | os.PathLike) -> str:
    """The path of the retain configuration that belongs to a forget configuration.

    >>> retain_path("data/TOFU/forget05.json")
    'data/TOFU/retain95.json'
    """
    match = FORGET.fullmatch(config_name(path))
    if not match:
        raise ValueError(f"{path} is no forget configuration; expected ROOT/forget01, forget05 or forget10.")
    return sibling(path, f"retain{100 - int(match[1])}")


def read_refusals(path: str | os.PathLike) -> list[str]:
    """Reads `idontknow.jsonl` of the authors' code: plain lines, in spite of the name, each one way to refuse.

    Raises:
        ValueError: where there is no line with text.
    """
    lines = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} holds no refusal; expected one a line.")
    return lines
