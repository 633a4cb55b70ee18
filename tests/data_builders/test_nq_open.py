"""NQ-open: the published files, and what is wrong with others."""

import json

import datasets
import pytest

from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.data_builders.sources.nq_open import nq_open_rows


def test_the_published_files(data_dir):
    rows = list(nq_open_rows(str(data_dir / "nq_open")))
    assert len(rows) == 3610
    assert rows[0]["prompt"] == "nq question: when was the last time anyone was on the moon"
    assert rows[0]["completion"] == " 14 December 1972 UTC" and rows[0]["answers"][1] == "December 1972"
    efficient = str(data_dir / "nq_open" / "NQ-open.efficientqa.dev.1.1.jsonl")
    assert sum(1 for _ in nq_open_rows(efficient, prompt="Question: {question}? Answer:")) == 1800


def test_it_is_asked_as_in_zsre_editing_data(data_dir):
    file = data_dir / "zsre_easyedit_sample" / "gpt-j-6b_UltraEdit_N10_Sequential.json"
    case = json.loads(file.read_text())[0]["requested_rewrite"]["locality"]["neighborhood"]["prompt"]
    start = next(nq_open_rows(str(data_dir / "nq_open")))["prompt"][: len("nq question: ")]
    assert case.startswith(start)


def test_parquet_as_on_the_hub(tmp_path):
    folder = tmp_path / "nq_open" / "validation"
    folder.mkdir(parents=True)
    rows = [{"question": "who sang", "answer": ["Ann", "Bob"]}]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "0000.parquet"))
    (row,) = nq_open_rows(str(tmp_path / "nq_open" / "validation"))
    assert (row["completion"], row["kind"], row["source_id"]) == (" Ann", "facts", "0")


def test_faults_come_together(tmp_path):
    file = tmp_path / "nq.jsonl"
    file.write_text('{"question": " ", "answer": ["a"]}\n{"question": "who", "answer": []}\n')
    with pytest.raises(InvalidDataset) as err:
        list(nq_open_rows(str(file)))
    assert err.value.num_faults == 2 and "row 2: `answer` must be a list" in str(err.value)
    file.write_text('{"query": "who"}\n')
    with pytest.raises(InvalidDataset, match="columns question, answer are missing; columns found: query"):
        list(nq_open_rows(str(file)))
    with pytest.raises(ValueError, match=r"must hold {question} once"):
        list(nq_open_rows(str(file), prompt="who"))
    with pytest.raises(FileNotFoundError, match=r"nothing at|no configuration"):
        list(nq_open_rows(str(tmp_path / "gone" / "deeper")))
