import pytest

from biasunlearn_trainer.eval.metrics import wilson_interval
from biasunlearn_trainer.eval.metrics.choice import choice_accuracy, is_chosen, written_letter


def test_a_tie_is_no_choice():
    assert [is_chosen([-1.0, -3.0, -2.0], place) for place in range(3)] == [True, False, False]
    assert not any(is_chosen([-1.0, -1.0], place) for place in range(2))


@pytest.mark.parametrize(
    ("answer", "place"),
    [("B", 1), ("b. Anna", 1), ("**C**", 2), ("(D)", 3), ("E", None), ("3", None), ("", None), ("_ _", None)],
)
def test_written_letter(answer, place):
    assert written_letter(answer, 4) == place


def test_letters_end_where_the_options_end():
    assert written_letter("D", 3) is None and written_letter("D", 4) == 3


def test_accuracy_and_chance():
    # Two of four right; chance is (1/4 + 1/4 + 1/2 + 1/3) / 4 = 4/3 / 4 = 1/3.
    kept = choice_accuracy([True, True, False, False], [4, 4, 2, 3])
    assert (kept.value, kept.n, kept.ideal, kept.higher_is_better) == (0.5, 4, 1.0, True)
    assert kept.ci95 == wilson_interval(0.5, 4)
    forgotten = choice_accuracy([True, True, False, False], [4, 4, 2, 3], to_chance=True)
    assert forgotten.ideal == pytest.approx(1 / 3) and forgotten.higher_is_better is None
    assert forgotten.ci95 == kept.ci95


def test_nothing_to_choose():
    with pytest.raises(ValueError, match="at least one option, got 0"):
        choice_accuracy([True], [0])
    with pytest.raises(ValueError, match="at least one item"):
        choice_accuracy([], [])
