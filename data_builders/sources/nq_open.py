"""NQ-open (Lee, Chang and Toutanova 2019; of Natural Questions, Kwiatkowski et al. 2019): questions, short answers.

Read are JSON lines {"question", "answer": [...]} as Google published them, or the same columns in Parquet or on the Hub
(google-research-datasets/nq_open). The repository's licence is Apache 2.0; Natural Questions are elsewhere released
under CC BY-SA 3.0. They are what a model knows apart from any bias: the questions that text locality is measured on.
"""

from collections.abc import Iterator
from pathlib import Path

from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.published import load_config, missing_columns, text_rows

FILE = "NQ-open.dev.jsonl"
LICENCE = "Apache 2.0 (the questions also CC BY-SA 3.0)"
PROMPT = "nq question: {question}"
"""How MEND and EasyEdit ask them."""


def nq_open_rows(path: str, *, prompt: str = PROMPT) -> Iterator[dict]:
    """A row a question, answered by the first of its answers; `answers` has all.

    Args:
        path: a file, a folder with `NQ-open.dev.jsonl`, or OWNER/NAME/SPLIT on the Hub.
        prompt: how the question is put; it holds {question}.

    Raises:
        FileNotFoundError, ConnectionError: nothing is there.
        InvalidDataset: faults in the rows, all together.
        ValueError: a prompt without its slot.
    """
    if prompt.count("{question}") != 1:
        raise ValueError(f"`prompt` must hold {{question}} once, got {prompt!r}.")
    local = Path(path).expanduser()
    dataset = load_config(local / FILE if (local / FILE).is_file() else path)
    faults = Faults(str(path))
    if missing_columns(dataset, ("question", "answer"), faults):
        faults.raise_if_any()
    rows = list(text_rows(dataset, ()))
    for where, row in rows:
        if not isinstance(row["question"], str) or not row["question"].strip():
            faults.add(f"`question` must be a text, got {row['question']!r:.60}", where)
        if not isinstance(row["answer"], list) or not row["answer"] or not all(map(_is_text, row["answer"])):
            faults.add(f"`answer` must be a list of at least one text, got {row['answer']!r:.60}", where)
    faults.raise_if_any()
    for number, (_, row) in enumerate(rows):
        yield {
            "prompt": prompt.replace("{question}", row["question"].strip()),
            "completion": f" {row['answer'][0].strip()}",
            "polarity": "unrelated",
            "pair_id": f"nq_open-{number}",
            "source": "nq_open",
            "source_id": str(number),
            "kind": "facts",
            "answers": row["answer"],
        }


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())
