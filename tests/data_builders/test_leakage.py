"""Shared rows are found by text and picture content, and only those."""

import time

import PIL.Image
import pytest
from datasets import Dataset

from biasunlearn_trainer.data_builders.leakage import check_leakage, find_leakage
from biasunlearn_trainer.data_builders.rows import rows_to_dataset


def row(prompt, completion, images=None, **more):
    return {"prompt": prompt, "completion": completion, "images": images, **more}


def test_same_text_in_forget_and_retain():
    forget = rows_to_dataset([row("q1", " a"), row("q2", " b"), row("q2", " b")])
    retain = rows_to_dataset([row("q1", " c"), row("q2", "  b"), row("q3", " a")])
    leaks = find_leakage({"forget": forget, "retain": retain})
    assert [(leak.first, leak.first_row, leak.second, leak.second_row) for leak in leaks] == [
        ("forget", 1, "retain", 1)
    ]
    assert "forget[1] = retain[1]: 'q2' -> 'b'" in str(leaks[0])


def test_pictures_are_compared_by_content(tmp_path):
    for name, colour in (("red", "red"), ("copy_of_red", "red"), ("blue", "blue")):
        PIL.Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    sets = {
        "forget": rows_to_dataset([row("q", " a", "red.png")], folder=tmp_path),
        "retain": rows_to_dataset([row("q", " a", name) for name in ("blue.png", "copy_of_red.png")], folder=tmp_path),
        "report": rows_to_dataset([row("q", " a", PIL.Image.new("RGB", (4, 4), "blue")), row("q", " a")]),
    }
    leaks = find_leakage(sets)
    assert [(leak.second, leak.second_row, leak.num_images) for leak in leaks] == [("retain", 1, 1)]
    sets["forget"] = rows_to_dataset([row("q", " a", "blue.png")], folder=tmp_path)
    assert [(leak.second, leak.second_row) for leak in find_leakage(sets)] == [("retain", 0), ("report", 0)]


def test_decoded_pictures_are_compared_by_their_pixels(tmp_path):
    picture = PIL.Image.new("RGB", (4, 4), "red")
    picture.save(tmp_path / "red.bmp")
    forget = rows_to_dataset([row("q", " a", "red.bmp")], folder=tmp_path)
    assert len(find_leakage({"forget": forget, "report": [row("q", " a", [picture])]})) == 1
    assert find_leakage({"forget": forget, "report": [row("q", " a", [PIL.Image.new("RGB", (2, 8), "red")])]}) == []
    # Stored pictures are compared as stored: another encoding is another picture.
    picture.save(tmp_path / "red.png")
    assert (
        find_leakage({"forget": forget, "retain": rows_to_dataset([row("q", " a", "red.png")], folder=tmp_path)}) == []
    )


def test_picture_order_and_text_boundary_matter(tmp_path):
    red, blue = PIL.Image.new("RGB", (4, 4), "red"), PIL.Image.new("RGB", (4, 4), "blue")
    forget = rows_to_dataset([row("q", " a", [red, blue]), row("q a", " b", [red])])
    retain = rows_to_dataset([row("q", " a", [blue, red]), row("q", " a b", [red])])
    assert find_leakage({"forget": forget, "retain": retain}) == []


def test_biased_answer_of_a_reported_question_is_a_leak():
    forget = rows_to_dataset([row("q", " the fox")])
    report = rows_to_dataset([row("q", " unknown", rejected=" the fox")])
    assert len(find_leakage({"forget": forget, "report": report})) == 1
    # A preferred set holds the biased answer beside the right one on purpose.
    assert find_leakage({"forget": forget, "retain": report}) == []


def test_messages_are_compared():
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    other = {**chat, "completion": [{"role": "assistant", "content": "b"}]}
    assert len(find_leakage({"forget": rows_to_dataset([chat]), "retain": rows_to_dataset([other, chat])})) == 1


def test_plain_lists_and_chosen_pairs():
    rows = [{"prompt": "q", "completion": " a"}]
    assert find_leakage({"retain": rows, "report": rows, "probe": []}) == []
    assert len(find_leakage({"retain": rows, "report": rows}, pairs=[("retain", "report")])) == 1
    with pytest.raises(ValueError, match="nothing to compare"):
        find_leakage({"retain": rows, "report": rows})


def test_check_raises_or_warns_with_the_first_rows(caplog):
    rows = [{"prompt": f"q{number}", "completion": " a"} for number in range(8)]
    with pytest.raises(ValueError, match=r"8 row\(s\) of the retain set are in the forget set too") as caught:
        check_leakage({"forget": rows, "retain": rows}, num_shown=3)
    assert "'q2'" in str(caught.value) and "'q3'" not in str(caught.value) and "... and 5 more" in str(caught.value)
    assert len(check_leakage({"forget": rows, "retain": rows}, on_leak="warn")) == 8
    assert "8 row(s)" in caplog.text
    assert check_leakage({"forget": rows[:4], "retain": rows[4:]}) == []
    with pytest.raises(ValueError, match="`on_leak` must be"):
        check_leakage({"forget": rows, "retain": rows}, on_leak="ignore")


def test_hundred_thousand_rows_take_seconds():
    texts = [str(number) for number in range(100_000)]
    forget = Dataset.from_dict({"prompt": texts, "completion": texts})
    retain = Dataset.from_dict({"prompt": texts, "completion": ["x"] * 99_999 + texts[-1:]})
    start = time.perf_counter()
    assert [leak.second_row for leak in find_leakage({"forget": forget, "retain": retain})] == [99_999]
    # 2 s on an idle core; the bound only tells hashing from comparing every pair of rows.
    assert time.perf_counter() - start < 60
