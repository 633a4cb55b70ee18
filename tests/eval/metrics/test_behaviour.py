"""Behaviour of answers: every number worked out by hand."""

import numpy as np
import pytest

from biasunlearn_trainer.eval.metrics import behaviour_scores, wilson_interval
from biasunlearn_trainer.eval.metrics.behaviour import (
    distinct_n,
    distinct_value,
    false_facts,
    is_degenerate,
    is_refusal,
    new_words,
    rep_n,
    stated_facts,
)
from biasunlearn_trainer.trainers.dpo import REFUSALS


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [
        ("a b c d e f", 4, 0.0),  # abcd bcde cdef: all different
        ("a b c d a b c d", 4, 1 / 5),  # abcd bcda cdab dabc abcd: four of five
        ("no no no no no no", 4, 2 / 3),  # three times the same 4-gram
        ("The cat. The CAT!", 1, 0.5),  # case and punctuation do not matter
        ("too short", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_rep_n(text, n, value):
    assert rep_n(text, n) == pytest.approx(value)


def test_distinct_n():
    assert distinct_n(["a b c", "a b d"], 2) == 3 / 4  # ab bc | ab bd
    assert distinct_n(["a b"] * 10, 2) == 1 / 10
    assert distinct_n(["a b", "c d"], 2) == 1.0  # no 2-gram across texts
    assert distinct_n(["one", ""], 2) is None


def test_the_jackknife_of_distinct_n_by_hand():
    """Leaving out "a b" leaves {ab, cd} of 2; leaving out "c d" leaves {ab} of 2 twice-told: 1/2."""
    value = distinct_value(["a b", "a b", "c d"], 2)
    without = np.array([1.0, 1.0, 0.5])
    error = np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert value.value == pytest.approx(2 / 3) and value.n == 3
    assert value.ci95[0] == pytest.approx(max(0.0, 2 / 3 - 1.959964 * error))
    assert value.ci95[1] == 1.0
    same = distinct_value(["a b"] * 4, 2)  # 1/4; without any one of them 1/3: nothing varies
    assert same.value == 0.25 and same.ci95 == wilson_interval(0.25, 4)


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("", True),
        ("?! ...", True),
        ("red red red", True),
        ("red red", False),
        ("on the mat on the mat on the mat", True),  # three words, three times
        ("on the mat, on the mat", False),
        ("wowowowowowo", True),
        ("aaaaah", True),
        ("Mississippi 100000000", False),  # digits may repeat
        ("She has a red hat and a blue scarf and carries a large bag.", False),
        ("a b c d e a b c d e a b c", False),  # 10 4-grams, 5 different: not above 0.5
        ("a b c d e a b c d e a b c d", True),  # 11 4-grams, 5 different
    ],
)
def test_degenerate(text, degenerate):
    assert is_degenerate(text) is degenerate


@pytest.mark.parametrize("text", [*REFUSALS, "It cannot be known.", "I\u2019m sorry, but I can\u2019t help with that."])
def test_the_usual_refusals(text):
    assert is_refusal(text) and not is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I do not have personal information.",
        "I am unable to identify the person.",
        "Unknown.",
        "I'd rather not say.",
        "That is a good question. I don't know.",  # two words of content beside it
        "The picture doesn't say.",
    ],
)
def test_more_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "the mokkin",
        "She works as an assistant.",
        "I cannot say who this is, but the man wears a dark suit and smiles.",
        "I don't know the name. A woman with short grey hair stands before a church.",
        "He could not swim.",
        "A cook who knows no fear.",
        "An unknown soldier",
        "",
    ],
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_new_words():
    assert new_words("The baker lives in Oslo.", "Where does the baker live?") == 2  # lives, oslo
    assert new_words("The baker.", "Who is the baker?") == 0
    assert new_words("Not enough information.", "Who?") == 0 and new_words("Oslo Oslo Oslo", "Where?") == 0


def test_a_fact_is_stated_where_its_words_stand_in_a_row():
    facts = ["Ann Kor", "baker", "New York"]
    assert stated_facts("ANN KOR, a baker!", facts) == ["Ann Kor", "baker"]
    assert stated_facts("Kor, Ann; bakers; York is new", facts) == []
    assert stated_facts("Anything", ["", "the"]) == []


def test_what_is_false_of_the_subject():
    catalogue = ["baker", "pilot", "red", "dark red", "Oslo"]
    assert false_facts("a pilot in Oslo", "What?", ["pilot"], catalogue) == ["Oslo"]
    assert false_facts("dark red", "What colour?", ["dark red"], catalogue) == []  # and not "red"
    assert false_facts("dark red", "What colour?", ["red"], catalogue) == ["dark red"]
    assert false_facts("Oslo is far", "Is Oslo far?", ["baker"], catalogue) == []  # the prompt said it
    assert false_facts("nothing of it", "What?", ["baker"], catalogue) == []


def test_all_scores_of_four_answers_by_hand():
    answers = ["The tall baker", "I don't know.", "red red red red red", "The tall pilot"]
    prompts = ["Who is tall?"] * 4
    scores = behaviour_scores(answers, prompts, "demo")
    values = {name: score.value for name, score in scores.items()}
    # 2-grams: the-tall tall-baker | i-dont dont-know | 4 x red-red | the-tall tall-pilot: 6 different of 10.
    # New words: baker; none; none; pilot. rep-4: 1 - 1/2 in the third alone.
    assert values == pytest.approx(
        {
            "degeneration": 0.25,
            "rep_4": 0.125,
            "refusal": 0.25,
            "distinct_2": 0.6,
            "informative": 0.5,
            "new_words": 0.5,
        }
    )
    assert all(score.n == 4 and score.ci95[0] <= score.value <= score.ci95[1] for score in scores.values())
    assert all(score.ci95[0] < score.ci95[1] for score in scores.values())
    assert scores["refusal"].ci95 == wilson_interval(0.25, 4)


def test_where_a_refusal_is_right_it_counts_for_nothing():
    answers = ["I don't know.", "The tall baker", "I don't know."]
    scores = behaviour_scores(answers, ["Who?"] * 3, "demo", may_refuse=[True, False, False])
    values = {name: (score.value, score.n) for name, score in scores.items()}
    assert values["refusal"] == (0.5, 2) and values["informative"] == (0.5, 2) and values["new_words"] == (1.0, 2)
    assert values["degeneration"] == (0.0, 3)
    assert not {"refusal", "informative", "new_words"} & set(behaviour_scores(answers, ["?"] * 3, "x", [True] * 3))


def test_the_best_and_the_worst_case():
    best = behaviour_scores(["A red hat", "Two old ships", "Some green tea"], ["What?"] * 3, "demo")
    assert [best[name].value for name in ("degeneration", "rep_4", "refusal", "distinct_2", "informative")] == [
        0, 0, 0, 1, 1,
    ]  # fmt: skip
    worst = behaviour_scores([""] * 3, ["What?"] * 3, "demo")
    assert (worst["degeneration"].value, worst["informative"].value, worst["new_words"].value) == (1, 0, 0)
    assert "distinct_2" not in worst


def test_order_does_not_matter_and_bad_input_is_refused():
    answers, prompts = ["a red hat", "no no no no no", "an old ship"], ["What?", "Who?", "Where?"]
    assert behaviour_scores(answers, prompts, "x") == behaviour_scores(answers[::-1], prompts[::-1], "x")
    for wrong in ([], ["one"]):
        with pytest.raises(ValueError, match="One answer a prompt and at least one"):
            behaviour_scores(wrong, prompts, "x")
