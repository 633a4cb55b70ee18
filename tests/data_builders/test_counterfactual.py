import re
from pathlib import Path
from random import Random

import pytest

from biasunlearn_trainer.data_builders.counterfactual import BIAS_TYPES, REASONS, swap
from biasunlearn_trainer.data_builders.counterfactual.__main__ import main
from biasunlearn_trainer.data_builders.counterfactual.swap import apply
from biasunlearn_trainer.data_builders.counterfactual.words import table
from biasunlearn_trainer.data_builders.sources import bbq, crows_pairs, stereoset

# Written before the code, with the counterfactual by hand: bias type, target group (or none), sentence, expected.
LINES = (Path(__file__).parent / "test_counterfactual_sentences.tsv").read_text("utf-8").splitlines()[1:]
SENTENCES = [tuple(line.split("\t")) for line in LINES]


class TestTwoHundredSentences:
    @pytest.mark.parametrize(("bias_type", "to", "sentence", "expected"), SENTENCES, ids=[s[2] for s in SENTENCES])
    def test_none_is_wrong(self, bias_type, to, sentence, expected):
        result = swap(sentence, bias_type, to or None)
        if expected.startswith("!"):
            assert (result.text, result.reason) == (None, expected[1:])
        elif result.text is None:
            # A refusal is not wrong; how many there may be is the next test.
            assert result.reason in REASONS and result.detail
        else:
            assert result.text == expected

    def test_there_are_200_and_at_most_15_percent_are_refused(self):
        assert len({sentence for _, _, sentence, _ in SENTENCES}) == 200
        assert {bias_type for bias_type, *_ in SENTENCES} == set(BIAS_TYPES)
        refused = [s for s in SENTENCES if swap(s[2], s[0], s[1] or None).text is None]
        assert len(refused) <= 30
        assert len([s for s in SENTENCES if s[3].startswith("!")]) <= len(refused), "what must be refused was swapped"

    @pytest.mark.parametrize(("bias_type", "to", "sentence", "expected"), SENTENCES, ids=[s[2] for s in SENTENCES])
    def test_the_expected_swapped_gives_the_sentence(self, bias_type, to, sentence, expected):
        result = swap(sentence, bias_type, to or None)
        if result.text is not None:
            assert swap(expected, bias_type, result.groups[0]).text == sentence


def assert_reversible(texts, least):
    """Every accepted text comes back, and its edits make the result; at least `least` (share) are accepted."""
    accepted = 0
    for text, bias_type in texts:
        result = swap(text, bias_type)
        if result.text is None:
            assert result.reason in REASONS
            continue
        accepted += 1
        back = swap(result.text, bias_type, result.groups[0])
        assert back.text == text
        assert result.text != text and apply(text, result.edits) == result.text
    assert accepted >= least * len(texts)


class TestRealSentences:
    def test_stereoset(self, data_dir):
        items = [i for i in stereoset.read_stereoset(data_dir / "stereoset") if i.bias_type in ("gender", "religion")]
        rows = stereoset.to_rows(items, ("stereotype", "anti_stereotype"))
        assert_reversible([(row["prompt"] + row["completion"], row["bias_type"]) for row in rows], 0.7)

    def test_crows_pairs(self, data_dir):
        pairs = crows_pairs.read_crows_pairs(data_dir / "crows_pairs")
        assert_reversible([(text, pair.bias_type) for pair in pairs for text in (pair.sent_more, pair.sent_less)], 0.45)

    def test_bbq(self, data_dir):
        items = bbq.read_bbq(data_dir / "bbq")[::12]
        texts = [(f"{i.context}\n\nQ: {i.question}\nA: {i.answers[i.label]}", i.bias_type) for i in items]
        assert_reversible(texts, 0.3)


# What a second reading, after the first version, found wrong or risky.
AFTERTHOUGHTS = [
    ("I like her very much.", "I like him very much."),
    ("The boss thanked her warmly for the report.", "The boss thanked him warmly for the report."),
    ("The cat scratched her face and his.", "The cat scratched his face and hers."),
    ("He carried her upstairs.", "She carried him upstairs."),
    ("He carried her bags upstairs.", "She carried his bags upstairs."),
    ("The actresses' rooms are small.", "The actors' rooms are small."),
    ("The actor's his friend.", "The actress's her friend."),
    ("Ms Miller met Mr Brown.", "Mr Miller met Ms Brown."),
    ("He kissed her goodnight.", None),
    ("I met her face to face.", None),
    ("Man is mortal.", None),
    ("God loves his children.", None),
    ("The ship and her crew were lost.", None),
    ("Kacey failed because she was tired.", None),
    ("April lost her dog.", None),
    ("John Smith sold his house.", None),
    ("Mary told hE.", None),
    ("mary told him.", None),
    ("She mothers him too much.", None),
    ("Her's is lost.", None),
    ('They bought her "friend" a drink.', None),
    ("An woman smiled.", None),
    # "Susan'" would be wrong, and so would "actor'".
    ("Thomas' book is lost.", None),
    ("The actress' coat is lost.", None),
    # The apostrophe may end a quotation.
    ("'I saw the ladies' he said.", None),
    ("The gods smiled at the ladies' choir.", "The gods smiled at the gentlemen's choir."),
]


@pytest.mark.parametrize(("sentence", "expected"), AFTERTHOUGHTS)
def test_afterthoughts(sentence, expected):
    assert swap(sentence, "gender").text == expected


class TestSwap:
    def test_a_text_of_several_sentences(self):
        text = "My aunt is a nun.\nShe lost her keys! Did he find them?"
        assert swap(text, "gender").text == "My uncle is a monk.\nHe lost his keys! Did she find them?"

    def test_two_groups_are_exchanged_whatever_the_target(self):
        text = "The Muslim befriended a Christian."
        assert swap(text, "religion", "hindu").text == "The Christian befriended a Muslim."

    def test_the_first_target_that_can_is_taken(self):
        # "Muslim" between an article and an unknown word may be noun or adjective, and only Jews have two words.
        assert swap("A Muslim prayed.", "religion", "jewish").reason == "word_class"
        assert swap("A Muslim prayed.", "religion").groups == ("muslim", "christian")

    def test_edits_are_places_in_the_text(self):
        result = swap("An actor, and his aunt.", "gender")
        assert result.edits == ((0, 2, "An"), (3, 8, "actress"), (14, 17, "her"), (18, 22, "uncle"))

    def test_curly_apostrophes_and_plural_possessives(self):
        assert swap("The ladies\u2019 coats", "gender").text == "The gentlemen\u2019s coats"
        assert swap("The women's coats", "gender").text == "The men's coats"

    def test_nothing_in_it(self):
        for text in ("", "   ", "12 + 3 = 15", "?!"):
            assert swap(text, "gender").reason == "no_term"

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="No word pairs for bias type 'genre'; there are some for: age"):
            swap("She left.", "genre")
        with pytest.raises(ValueError, match="religion has no group 'jedi'; groups: christian, muslim"):
            swap("A Muslim prayed.", "religion", "jedi")

    @pytest.mark.parametrize("text", ["her " * 300, "'" * 500, "a-" * 400 + "b", "H\u0130S she", "she\x00he", "é" * 50])
    def test_odd_texts_end(self, text):
        result = swap(text, "gender")
        assert result.reason in REASONS or swap(result.text, "gender").text == text


@pytest.mark.parametrize("bias_type", BIAS_TYPES)
def test_any_order_of_words_ends_and_comes_back(bias_type):
    """Words of the table, of the grammar's classes, names, numbers and marks, drawn with a seed, some in capitals."""
    random = Random(bias_type)
    words = sorted(table(bias_type).forms) * 3 + sorted(table("gender").forms)[::7]
    words += ["her", "his", "a", "an", "the", "is", "5", "said", "young", "Kacey", "of", "to", "very", "people", "and"]
    marks = [" "] * 12 + [", ", ". ", "'s ", "' ", ' "', '" ', "-", "\n", "? ", "/", " 3 ", "", "\u2019s "]
    accepted = 0
    for _ in range(600):
        drawn = (random.choice(words) for _ in range(random.randint(1, 9)))
        text = "".join(random.choice((str, str, str.capitalize, str.upper))(w) + random.choice(marks) for w in drawn)
        result = swap(text, bias_type)
        if result.text is None:
            assert result.reason in REASONS
        else:
            accepted += 1
            assert swap(result.text, bias_type, result.groups[0]).text == text
    assert accepted


class TestCommand:
    def test_all_types_whose_words_occur(self, capsys):
        assert main(["The old Muslim woman lost her keys."]) == 0
        shown = capsys.readouterr().out
        assert "  age, old -> young: The young Muslim woman lost her keys.\n" in shown
        assert "  gender, female -> male: The old Muslim man lost his keys.\n" in shown
        assert "  religion, muslim -> christian: The old Christian woman lost her keys.\n" in shown
        assert len(re.findall("^  ", shown, re.M)) == 3

    def test_a_refusal_says_why(self, capsys):
        assert main(["He called her fat.", "--bias_type", "gender"]) == 1
        assert "refused, ambiguous_her (her)" in capsys.readouterr().out
        assert main(["It rained."]) == 1
        assert "no word of any table" in capsys.readouterr().out

    def test_bad_input(self, capsys):
        for arguments in (["She left.", "--to", "male"], ["She left.", "--to", "jedi", "--bias_type", "gender"]):
            with pytest.raises(SystemExit):
                main(arguments)
        assert "gender has no group 'jedi'" in capsys.readouterr().err
