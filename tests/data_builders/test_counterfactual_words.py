from collections import Counter
from importlib import resources

import pytest

from biasunlearn_trainer.data_builders import schema
from biasunlearn_trainer.data_builders.counterfactual import BIAS_TYPES, REASONS, swap, words_version
from biasunlearn_trainer.data_builders.counterfactual.tokens import Sentence, article, cased_like, wants_an
from biasunlearn_trainer.data_builders.counterfactual.words import Concept, Table, table, word_class

WORDS = resources.files("biasunlearn_trainer.data_builders").joinpath("words")


class TestFiles:
    def test_there_is_one_for_every_bias_type_of_the_schema(self):
        assert set(BIAS_TYPES) == set(schema.BIAS_TYPES) - {"other"}

    def test_each_says_its_version_and_what_it_is(self):
        for file in WORDS.iterdir():
            first, second = file.read_text("utf-8").splitlines()[:2]
            assert first == "# version: 1" and second.startswith("# "), file.name

    @pytest.mark.parametrize("bias_type", BIAS_TYPES)
    def test_no_word_has_two_groups_and_every_group_has_words(self, bias_type):
        made = table(bias_type)
        groups = Counter(group for forms in made.forms.values() for _, group in forms)
        assert set(groups) == set(made.groups)
        for forms in made.forms.values():
            assert len({group for _, group in forms}) == 1
            assert all(len(concept.words) > 1 for concept, _ in forms)

    @pytest.mark.parametrize("bias_type", BIAS_TYPES)
    def test_what_is_refused_has_a_known_reason(self, bias_type):
        found = [reason for phrases in table(bias_type).refusals.values() for _, reason, _ in phrases]
        assert set(found) <= set(REASONS)

    def test_names_are_no_words_that_are_refused(self):
        made = table("gender")
        names = {word for word, forms in made.forms.items() if forms[0][0].kind == "name"}
        single = {phrases[0] for listed in made.refusals.values() for phrases, _, _ in listed if len(phrases) == 1}
        assert not names & single and not names & word_class("unisex")
        assert not [name for name in names if name.endswith("s") and name != "thomas"]

    @pytest.mark.parametrize("bias_type", BIAS_TYPES)
    def test_every_noun_swaps_with_every_other_group_and_back(self, bias_type):
        made, tried = table(bias_type), 0
        for forms in made.forms.values():
            concept, group = forms[0]
            if concept.kind != "noun":
                continue
            for other in concept.words.keys() - {group}:
                word, expected = concept.words[group], concept.words[other]
                start, after = ("Two", "are") if concept.plural else ("My", "is")
                result = swap(f"{start} {word} {after} here.", bias_type, other)
                if result.reason in ("other_sense", "bound_word"):
                    continue
                assert result.text == f"{start} {expected} {after} here."
                tried += 1
        assert tried or bias_type in ("disability", "physical_appearance", "nationality")

    def test_the_version_is_twelve_digits(self):
        assert len(words_version()) == 12 and int(words_version(), 16)

    def test_a_word_of_two_groups_is_refused(self):
        made = Table(("a", "b"))
        made.add(Concept("noun", False, {"a": "one", "b": "two"}))
        with pytest.raises(ValueError, match="'one' stands for b and for a"):
            made.add(Concept("noun", False, {"b": "one"}))


class TestTokens:
    def test_words_clitics_and_what_follows(self):
        sentence = Sentence("She's the boys' ex-teacher, isn't she? 5 left", frozenset())
        assert [(t.text, t.clitic) for t in sentence.tokens] == [
            ("She", "'s"),
            ("the", ""),
            ("boys", "'"),
            ("ex-teacher", ""),
            ("isn", "'t"),
            ("she", ""),
            ("left", ""),
        ]
        assert [sentence.next(i) for i in (0, 3, 4, 6)] == ["the", "", "she", ""]
        assert [token.initial for token in sentence.tokens] == [True, False, False, False, False, False, True]
        assert Sentence("her 5 books").next(0) == "#"

    def test_a_title_ends_no_sentence(self):
        sentence = Sentence("I saw Mr. Miller. He left.", frozenset(["mr"]))
        assert [token.text for token in sentence.tokens if token.initial] == ["I", "He"]

    def test_case(self):
        assert cased_like("SENIOR CITIZENS", "senior citizens", "young adults") == "YOUNG ADULTS"
        assert cased_like("Jew", "Jew", "Hindu") == "Hindu"
        assert cased_like("jew", "Jew", "Hindu") is None

    @pytest.mark.parametrize(
        ("word", "an"),
        [
            *(("hour", True), ("uncle", True), ("unimportant", True), ("Ethiopian", True), ("ugly", True)),
            *(("house", False), ("university", False), ("Ukrainian", False), ("one", False), ("useful", False)),
        ],
    )
    def test_articles(self, word, an):
        assert wants_an(word) is an

    def test_an_article_keeps_its_case(self):
        assert article("A", "waiter", "actress") == "An"
        assert article("A", "MAN", "AUNT") == "AN"
        assert article("AN", "AUNT", "MAN") == "A"
        assert article("a", "aunt", "man") is None
