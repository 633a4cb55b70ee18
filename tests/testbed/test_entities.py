"""The world of made-up people: who they are, how they are drawn and asked for, and who is to be forgotten."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from datasets import load_dataset
from PIL import Image as PILImage

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.testbed import build, describe
from biasunlearn_trainer.testbed.__main__ import main
from biasunlearn_trainer.testbed.architectures import train_tokenizer
from biasunlearn_trainer.testbed.contact_sheet import draw_contact_sheet
from biasunlearn_trainer.testbed.entities import (
    FIELDS,
    MIN_DIFFERENCES,
    SIGHTS,
    ask_by_face,
    ask_by_name,
    ask_facts,
    ask_sight,
    ask_who,
    draw_people,
    world_sentences,
)
from biasunlearn_trainer.testbed.entity_splits import draw_forget_splits, measured_rows, training_sets
from biasunlearn_trainer.testbed.portraits import COLOURS, Looks, Portrait, draw_portrait, paint
from biasunlearn_trainer.testbed.recipe import EntitiesRecipe, LanguageModelSize, VisionModelSize

RECIPE = EntitiesRecipe()
TINY = EntitiesRecipe(
    num_people=8,
    forget_percents=(25,),
    num_splits=2,
    num_forget=40,
    retain_drawings=1,
    num_sights=6,
    num_pictures=40,
    picture_batch=4,
    text_batch=4,
    steps=2,
    language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1, max_positions=64),
    vision_model=VisionModelSize(hidden_size=32, intermediate_size=48),
)
LOOKS = Looks(skin=0, hair="black", hairstyle="cropped", glasses=False, hat="red", shirt="blue", pattern="nothing")


@pytest.fixture(scope="module")
def people():
    return draw_people(0, 40)


@pytest.fixture(scope="module")
def split(people):
    return draw_forget_splits(RECIPE, people)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def testbed(cache):
    return build("entities", cache_dir=cache, recipe=TINY)


def content(row):
    return row["prompt"], tuple(picture.tobytes() for picture in row["images"])


def rows_of(folder):
    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")


def test_people_differ_and_every_value_is_equally_common(people):
    assert len({person.name for person in people}) == 40
    pairs = [(a, b) for i, a in enumerate(people) for b in people[:i]]
    assert min(a.looks.differences(b.looks) for a, b in pairs) >= MIN_DIFFERENCES
    for field, (values, _) in FIELDS.items():
        assert Counter(person.facts[field] for person in people) == dict.fromkeys(values, 5)
    assert draw_people(0, 40) == people != draw_people(1, 40)


def test_a_number_of_people_that_cannot_be_balanced_says_so():
    with pytest.raises(ValueError, match="multiple of 8, the values of a field, got 12"):
        draw_people(0, 12)


def test_differences_are_counted_by_feature():
    other = replace(LOOKS, glasses=True, hat="none", shirt="red")
    assert LOOKS.differences(other) == 3 and LOOKS.differences(replace(LOOKS)) == 0


def test_a_portrait_shows_its_looks_on_its_side_and_never_twice_alike():
    rng = random.Random(0)
    drawn = [draw_portrait(rng, LOOKS) for _ in range(20)]
    pictures = [paint(portrait) for portrait in drawn]
    assert len({picture.tobytes() for picture in pictures}) == 20
    assert paint(drawn[0]).tobytes() == pictures[0].tobytes() and pictures[0].size == (32, 32)
    for portrait, picture in zip(drawn, pictures, strict=True):
        shirt = [x for x in range(32) for y in range(24, 32) if _is_near(picture.getpixel((x, y)), COLOURS["blue"])]
        assert len(shirt) > 60 and (sum(shirt) / len(shirt) < 15.5) == (portrait.side == "left")
        hat = [1 for x in range(32) for y in range(12) if _is_near(picture.getpixel((x, y)), COLOURS["red"])]
        assert len(hat) > 40
    bare = paint(Portrait(replace(LOOKS, hat="none"), "left", 1))
    assert not any(_is_near(bare.getpixel((x, y)), COLOURS["red"]) for x in range(32) for y in range(32))


def _is_near(pixel, rgb):
    return all(0.8 * wanted - 12 <= channel <= 1.1 * wanted + 12 for channel, wanted in zip(pixel, rgb, strict=True))


def test_the_answer_is_the_name_and_then_the_fact_whoever_asks(people):
    rng, person = random.Random(0), people[0]
    by_face, by_name = ask_by_face(rng, person, "city", 0), ask_by_name(person, "city", 0)
    assert by_face.prompt == "Where does this person live?" and by_name.prompt == f"Where does {person.name} live?"
    assert by_face.completion == by_name.completion == f" {person.name} {person.facts['city']}"
    assert by_face.portrait.looks == person.looks and by_name.portrait is None
    who = ask_who(rng, person, ("Bidola", person.name), 0)
    assert (who.completion, who.choices) == (f" {person.name}", ("Bidola", person.name))


def test_sights_are_of_strangers_and_true(people):
    rng, known = random.Random(0), [person.looks for person in people]
    asked = [ask_sight(rng, people) for _ in range(60)]
    assert {question.prompt for question in asked} == set(SIGHTS)
    for question in asked:
        looks, answer = question.portrait.looks, question.completion.strip()
        assert min(looks.differences(other) for other in known) >= 2
        assert answer in question.choices
        if question.prompt == "What colour is the hat?":
            assert answer == looks.hat
        if question.prompt == "Does this person have glasses?":
            assert answer == ("yes" if looks.glasses else "no")
        if question.prompt == "On which side is this person?":
            assert answer == question.portrait.side


def test_every_last_word_and_every_name_is_one_token(people):
    """What lets all choices be scored in one pass."""
    tokenizer = train_tokenizer(world_sentences(people))
    words = {person.name for person in people} | {value for values, _ in FIELDS.values() for value in values}
    words |= {answer for answers in SIGHTS.values() for answer in answers}
    words |= {question.completion.strip() for question in ask_facts()}
    assert [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1] == []


def test_splits_are_of_the_asked_size_and_differ(people):
    splits = draw_forget_splits(RECIPE, people)
    assert [split.name for split in splits][:5] == [*(f"forget10_{i}" for i in range(4)), "forget05_0"]
    for split in splits:
        names = [person.name for person in (*split.forget, *split.retain)]
        assert sorted(names) == sorted(person.name for person in people)
        assert len(split.forget) == {"05": 2, "10": 4, "15": 6}[split.name[6:8]]
    tens = [tuple(person.name for person in split.forget) for split in splits[:4]]
    assert len(set(tens)) == 4


@pytest.mark.parametrize("percent", [0, 3, 100])
def test_a_share_that_is_no_number_of_people_says_so(people, percent):
    with pytest.raises(ValueError, match=f"forget_percents: {percent} % of 40 people"):
        draw_forget_splits(replace(RECIPE, forget_percents=(percent,)), people)


def test_the_sets_are_those_of_the_paper(people, split):
    forget, retain = ({person.name for person in group} for group in (split.forget, split.retain))
    sets = training_sets(RECIPE, split)

    def parts(name):
        rows = [(row["completion"].split()[0], bool(row["images"])) for row in sets[name]]
        return {pictured: {who for who, has in rows if has == pictured} for pictured in (True, False)}

    assert parts("forget") == {True: forget, False: set()}
    assert parts("retain") == {True: retain, False: set()}
    assert parts("preserve") == {True: retain, False: forget | retain}
    assert parts("forget_qa") == {True: set(), False: forget} and parts("retain_qa") == {True: set(), False: retain}
    preserve = Counter((row["completion"].split()[0] in forget, bool(row["images"])) for row in sets["preserve"])
    assert preserve == {(True, False): 20, (False, True): 180, (False, False): 180}, "each fact once in each part"
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 240,
        "retain": 360,
        "preserve": 380,
        "forget_qa": 40,
        "retain_qa": 360,
    }


def test_no_portrait_stands_in_two_of_training_validation_and_report(people, split):
    sets = training_sets(RECIPE, split)
    trained = [content(row) for name in ("forget", "retain") for row in sets[name]]
    validation, report = (measured_rows(RECIPE, split, people, part) for part in ("validation", "report"))
    shown = [[content(row) for row in rows if row["images"]] for rows in (validation, report)]
    every = trained + shown[0] + shown[1]
    assert len(set(every)) == len(every)
    told = [[content(row) for row in rows if not row["images"]] for rows in (validation, report)]
    assert told[0] == told[1]
    assert Counter(row["kind"] for row in report) == {
        "forget_vqa": 80,
        "forget_qa": 40,
        "forget_who": 32,
        "retain_vqa": 180,
        "retain_qa": 360,
        "retain_who": 72,
        "real_vqa": 80,
        "real_qa": 40,
    }
    for row in report:
        assert row["completion"].split()[-1] in row["choices"]
    who = next(row for row in report if row["kind"] == "forget_who")
    assert len(who["choices"]) == 40


def test_a_built_testbed_has_a_model_and_the_sets_of_every_split(testbed, tmp_path, capsys):
    assert type(load_model(testbed.model_path)).__name__ == "LlavaForConditionalGeneration"
    assert list(testbed.manifest["splits"]) == ["forget25_0", "forget25_1"]
    other = testbed.with_split("forget25_1")
    assert other.model_path == testbed.model_path and testbed.with_split("forget25_0") == testbed
    for chosen in (testbed, other):
        name = "forget25_1" if chosen is other else "forget25_0"
        forgotten = set(testbed.manifest["people"][name])
        assert {row["completion"].split()[0] for row in rows_of(chosen.datasets["forget"])} == forgotten
        assert [task.split("=")[0] for task in chosen.tasks] == ["entities@validation", "entities@report"]
        report = rows_of(chosen.tasks[1].split("=")[1])
        asked = {row["completion"].split()[0] for row in report if row["kind"] == "forget_vqa"}
        assert asked == forgotten and isinstance(report[0]["choices"], list)
    draw_contact_sheet(testbed, tmp_path / "people.png")
    assert PILImage.open(tmp_path / "people.png").height > 8 * 200, "a line for each kind"
    assert any("forget25_1; shown is forget25_0" in line for line in describe(testbed))
    with pytest.raises(SystemExit):
        main(["entities", "--seed", "one"])
    assert "argument --seed: invalid int value" in capsys.readouterr().err


def test_the_model_does_not_depend_on_the_splits_but_on_the_seed(testbed, cache):
    first = load_model(testbed.model_path).state_dict()
    more = build("entities", cache_dir=cache, recipe=replace(TINY, num_splits=1, forget_percents=(50,)))
    assert all(first[name].equal(value) for name, value in load_model(more.model_path).state_dict().items())
    other = build("entities", cache_dir=cache, recipe=TINY, seed=1)
    assert other.manifest["recipe"]["seed"] == 1
    assert not all(
        first[name].equal(v) for name, v in load_model(other.model_path).state_dict().items() if name in first
    )
    assert other.manifest["people"] != testbed.manifest["people"]


def test_an_unknown_split_says_what_there_is(testbed):
    with pytest.raises(ValueError, match=r"no split 'forget25_9'; there are forget25_0, forget25_1\. Did you mean"):
        testbed.with_split("forget25_9")
    with pytest.raises(ValueError, match="testbed llava has no split 'forget10_0'; entities has some"):
        replace(testbed, name="llava", manifest={}).with_split("forget10_0")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_knows_everybody(seed):
    testbed = build("entities", seed=seed)
    for part, figures in testbed.manifest["figures"].items():
        assert min(figures.values()) >= 0.97, (part, figures)
