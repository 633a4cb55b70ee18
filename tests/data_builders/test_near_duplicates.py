"""Nearly equal rows: numbers by hand, the search against all pairs, pictures."""

import random

import numpy as np
import PIL.Image
import pytest

from biasunlearn_trainer.data_builders.near_duplicates import (
    NearDuplicates,
    difference_hash,
    find_near_duplicates,
    row_text,
    shingles,
    similarity,
)


def row(text, **more):
    return {"prompt": text, "completion": "", **more}


def test_similarity_is_the_share_of_common_word_pairs():
    # a b c d: ab bc cd; a b c e: ab bc ce; common 2 of 4.
    assert similarity(shingles("a b c d"), shingles("A b, c e")) == pytest.approx(2 / 4)
    assert similarity(shingles("a b"), shingles("c d")) == 0
    assert similarity(shingles(""), shingles("")) == 1


def test_the_search_finds_what_all_pairs_find():
    rng = random.Random(0)
    words = [f"w{n}" for n in range(60)]
    base = [[rng.choice(words) for _ in range(30)] for _ in range(60)]
    others = [row(" ".join(text)) for text in base]
    changed = []
    for text in base:
        copy = list(text)
        for _ in range(rng.randint(0, 3)):
            copy[rng.randrange(30)] = rng.choice(words)
        changed.append(row(" ".join(copy)))
    for threshold in (0.7, 0.8, 0.9):
        by_hand = {
            number
            for number, one in enumerate(changed)
            if max(similarity(shingles(row_text(one)), shingles(row_text(o))) for o in others) >= threshold
        }
        found = find_near_duplicates(changed, others, threshold)
        assert {near.row for near in found} == by_hand
        assert all(near.row == near.other for near in found)
        assert all(near.similarity >= threshold for near in found)
        assert 5 < len(by_hand) < 60


def test_the_same_question_is_near_only_with_a_near_picture(tmp_path):
    y, x = np.mgrid[0:64, 0:64]
    pictures = {"slope": x * 4, "brighter": np.minimum(x * 4 + 3, 255), "waves": (np.sin(x / 3) + 1) * 120 + 0 * y}
    for name, pixels in pictures.items():
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    asked = {name: row("Who is in the picture ?", images=[str(tmp_path / f"{name}.png")]) for name in pictures}
    index = NearDuplicates([asked["slope"]])
    assert index.nearest(asked["brighter"]).similarity == 1
    assert index.nearest(asked["waves"]) is None
    assert index.nearest(row("Who is in the picture ?")) is None
    assert difference_hash(PIL.Image.open(tmp_path / "slope.png")) == 0


def test_an_empty_index_and_messages():
    assert NearDuplicates([]).nearest(row("a b")) is None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is it?"}]}]
    assert row_text({"prompt": messages, "completion": "Ann."}) == "Who is it? Ann."
