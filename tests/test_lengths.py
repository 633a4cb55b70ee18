"""Lengths of rows, by column or by characters, from lists and from memory-mapped sets."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, load_from_disk

from biasunlearn_trainer.lengths import CHARACTERS_PER_IMAGE, row_lengths
from biasunlearn_trainer.rows import image_counts

CHAT = [
    {
        "prompt": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}],
        "completion": [{"role": "assistant", "content": "Anna"}],
    },
    {"prompt": [{"role": "user", "content": "Äh"}], "completion": [{"role": "assistant", "content": ""}]},
]


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_characters_of_plain_and_chat_rows(form):
    plain = [{"prompt": "Why?", "completion": " So."}, {"prompt": "Äß", "completion": "€"}]
    assert row_lengths(form(plain)).tolist() == [8, 3]
    assert row_lengths(form(CHAT)).tolist() == [11, 2]


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_messages_in_parts(form):
    parts = [{"type": "text", "text": "Who?"}, {"type": "text", "text": "Me"}]
    row = {"prompt": [{"role": "user", "content": parts}], "completion": [{"role": "assistant", "content": parts[:1]}]}
    assert row_lengths(form([row])).tolist() == [10]


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_a_column_of_lengths_comes_first(form):
    rows = [{"prompt": "a", "completion": "b", "length": 40, "tokens": 7.5}]
    assert row_lengths(form(rows)).tolist() == [40]
    assert row_lengths(form(rows), "tokens").tolist() == [7.5]
    assert row_lengths(form(rows), None).tolist() == row_lengths(form(rows), "absent").tolist() == [2]


@pytest.mark.parametrize("values", [["long", "short"], [3, None], [3, -1], [1.0, float("nan")]])
@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_what_is_no_length_is_refused(form, values):
    rows = [{"prompt": "a", "completion": "b", "length": value} for value in values]
    with pytest.raises(ValueError, match=r"'length'.*length_column_name"):
        row_lengths(form(rows))


def test_pictures_count_and_are_not_decoded(tmp_path):
    features = Features(prompt=Value("string"), completion=Value("string"), images=List(Image()))
    unreadable = {"bytes": b"no picture", "path": None}
    columns = {"prompt": ["a"] * 3, "completion": [""] * 3, "images": [[unreadable] * 2, [], None]}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    rows = load_from_disk(tmp_path)
    assert image_counts(rows).tolist() == [2, 0, 0]
    assert row_lengths(rows).tolist() == [1 + 2 * CHARACTERS_PER_IMAGE, 1, 1]
    assert row_lengths(rows.select([2, 0])).tolist() == [1, 1 + 2 * CHARACTERS_PER_IMAGE]


def test_a_set_of_many_pieces_keeps_its_order():
    texts = ["x" * (i % 97) for i in range(2000)]
    rows = Dataset.from_dict({"prompt": texts, "completion": texts, "images": [None] * 2000})
    expected = 2 * np.array([i % 97 for i in range(2000)])
    assert (row_lengths(rows) == expected).all()
    assert (row_lengths(rows.shuffle(seed=0).select(range(1500))) == expected[_shuffled(rows)]).all()


def _shuffled(rows):
    numbered = Dataset.from_dict({"number": range(len(rows))}).shuffle(seed=0)
    return list(numbered.select(range(1500))["number"])
