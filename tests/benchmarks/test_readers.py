"""The published layouts are read; what is wrong with a copy is named, all of it at once."""

import json
import re

import pytest
from datasets import load_from_disk

from biasunlearn_trainer.data_builders.schema import Faults, InvalidDataset
from biasunlearn_trainer.data_builders.sources import clear as clear_source
from biasunlearn_trainer.data_builders.sources import mllmu_bench, published, sb_bench, tofu
from biasunlearn_trainer.data_builders.sources import tofu as tofu_source
from biasunlearn_trainer.data_builders.sources.bbq import read_bbq
from biasunlearn_trainer.data_builders.sources.people import method_sets, to_rows
from biasunlearn_trainer.data_builders.sources.published import load_config, sibling
from biasunlearn_trainer.data_builders.sources.records import read_records
from biasunlearn_trainer.data_builders.sources.sb_bench_targets import find_target


def test_mllmu_bench(mllmu):
    questions = mllmu_bench.read_questions(mllmu / "forget_5")
    assert [(q.form, q.modality) for q in questions] == [
        (form, modality) for form in ("choice", "generation", "cloze") for modality in ("vqa", "qa")
    ]
    choice = questions[0]
    assert (choice.options, choice.label, choice.answer) == (("chess", "rowing", "baking", "pottery"), 0, "chess")
    assert choice.picture.open().getpixel((0, 0)) == (0, 40, 90) and questions[1].picture is None
    assert len({q.id for q in questions}) == 6 and {q.person for q in questions} == {"001"}


def test_the_test_set_is_asked_about_the_people_to_forget(mllmu):
    questions = mllmu_bench.read_test_questions(mllmu / "forget_5")
    assert {q.person for q in questions} == {"001"} and len(questions) == 6
    shades = {q.picture.open().getpixel((0, 0))[0] for q in questions if q.picture}
    assert len(shades) == 1 and shades < {200, 201}, "one of the pictures drawn anew, the same for all questions"
    assert len({q.person for q in mllmu_bench.read_questions(mllmu / "Test_Set")}) == 3


def test_the_sets_of_the_method(mllmu, clear):
    sets = method_sets(*mllmu_bench.read_method_questions(mllmu / "forget_5"))
    # One person to forget and two to keep, each with two questions of the fine-tuning data and one choice in text.
    assert [len(part) for part in sets["forget"]] == [2] and [len(part) for part in sets["retain"]] == [4]
    assert [(part[0]["part"], len(part)) for part in sets["preserve"]] == [
        ("forget_qa", 1),
        ("retain_vqa", 4),
        ("retain_qa", 2),
    ]
    row = sets["forget"][0][0]
    assert row["prompt"] == [{"role": "user", "content": "What is the hobby?"}] and row["person"] == "001"
    assert row["completion"] == [{"role": "assistant", "content": "chess"}] and row["images"][0].size == (32, 32)
    text = sets["preserve"][0][0]
    assert "images" not in text and text["completion"][0]["content"] == "chess"
    written = mllmu_bench.read_method_questions(mllmu / "forget_5", text_task="generation")[0]
    assert [q.answer for q in written if q.modality == "qa"] == ["They like chess."]

    sets = method_sets(*clear_source.read_method_questions(clear / "forget05"), chat=False)
    assert [part[0]["part"] for part in sets["preserve"]] == ["forget_qa", "retain_vqa", "retain_qa"]
    assert sets["preserve"][0][0]["prompt"] == "Question: Where was Ana Ilves born?\nAnswer:"
    assert sets["forget"][0][1]["completion"] == " Ana Ilves reads book 1."


def test_a_forget_configuration_with_metadata_is_its_own_training_set(mllmu):
    load_config(mllmu / "ft_Data").select([0]).add_column("x", [1]).to_parquet(mllmu / "only.parquet")
    assert [q.answer for q in mllmu_bench.read_training_questions(mllmu / "only.parquet")] == ["chess"] * 2


def test_sets_without_portraits_are_refused(mllmu):
    texts = [q for q in mllmu_bench.read_questions(mllmu / "forget_5") if q.modality == "qa"]
    with pytest.raises(ValueError, match="there are 0 about the people to forget and 0 about the others"):
        method_sets(texts, texts)
    with pytest.raises(ValueError, match="no forget configuration; expected ROOT/forget_5"):
        mllmu_bench.read_method_questions(mllmu / "retain_95")


def test_all_faults_of_mllmu_bench_come_together(tmp_path, mllmu_row_of, mllmu_rows):
    rows = [mllmu_row_of("001"), mllmu_row_of("002"), mllmu_row_of("003")]
    rows[0]["Classification_Task"]["Image_Textual_Questions"][0]["Correct_Answer"] = "E"
    rows[0]["Generation_Task"][0]["Type"] = "Imagined"
    rows[1]["Mask_Task"][0]["Question"] = "no blank"
    rows[1]["Generation_Task"][1]["Ground_Truth"] = ""
    rows[2]["image"] = {"bytes": b"no picture", "path": None}
    mllmu_rows(tmp_path, "forget_5", rows)
    with pytest.raises(InvalidDataset) as caught:
        mllmu_bench.read_questions(tmp_path / "forget_5")
    for part in (
        "5 faults",
        "row 1, Image_Textual_Questions 1: Correct_Answer is 'E', expected one of A, B, C, D",
        "row 1, Generation_Task 1: Type is 'Imagined', expected one of Image_Textual, Pure_Text",
        "row 2, Mask_Task 1: no blank (__) in 'no blank'",
        "row 2, Generation_Task 2: Ground_Truth is empty",
        "row 3: image stored in the row cannot be read",
    ):
        assert part in str(caught.value)
    with pytest.raises(InvalidDataset, match="columns metadata are missing; columns found: image, ID"):
        mllmu_bench.read_training_questions(tmp_path / "forget_5")


def test_clear(clear):
    questions = clear_source.read_questions(clear / "forget05_perturbed")
    caption, name = questions[:2]
    assert (caption.form, caption.paraphrased, len(caption.wrong)) == ("generation", "Ana Ilves is reading.", 2)
    assert (name.form, name.answer, len(name.options)) == ("choice", "Ana Ilves", 4)
    assert name.options[name.label] == "Ana Ilves" and name.person == "Ana Ilves"
    # The right name does not stand in one place, and stands in the same one in every run.
    labels = [q.label for q in clear_source.read_questions(clear / "forget05_perturbed") if q.form == "choice"]
    assert labels == [q.label for q in questions if q.form == "choice"]
    mixed = clear_source.read_questions(clear / "forget05+tofu")
    assert [q.modality for q in mixed] == ["vqa", "vqa", "qa"] and mixed[2].answer == "In Tartu."
    assert clear_source.read_questions(clear / "real_faces")[0].question == clear_source.NAME_QUESTION
    world = clear_source.read_questions(clear / "real_world")[0]
    assert (world.question, set(world.options)) == ("What is this?", {"A bridge", "A hat", "A cat"})


def test_a_saved_dataset_is_a_configuration_too(clear):
    load_config(clear / "retain_perturbed").save_to_disk(clear / "retain95_perturbed")
    assert len(load_from_disk(str(clear / "retain95_perturbed"))) == 2
    assert len(clear_source.read_questions(clear / "retain95_perturbed")) == 4


def test_tofu(tofu):
    sets = tofu_source.read_evaluation(tofu / "forget10")
    assert list(sets) == ["forget10_perturbed", *tofu_source.EVALUATION_SETS]
    question = sets["forget10_perturbed"][0]
    assert (question.paraphrased, question.wrong) == ("It was Ana Ilves wrote A.", ("Cai.", "Eli.", "Gus."))
    assert tofu_source.read_questions(tofu / "retain90")[0].wrong == ()
    rows = to_rows(tofu_source.read_questions(tofu / "forget10"))
    assert rows[0]["completion"] == [{"role": "assistant", "content": "Ana Ilves wrote A."}] and "images" not in rows[0]


def test_published_tofu_files(data_dir):
    for name, count in (("real_authors_perturbed", 100), ("world_facts_perturbed", 117)):
        questions = tofu.read_questions(data_dir / "tofu" / name)
        assert len(questions) == count and all(len(q.wrong) == 3 for q in questions)
    assert len(tofu.read_refusals(data_dir / "tofu" / "idontknow.jsonl")) == 100
    with pytest.raises(FileNotFoundError, match=r"no configuration 'forget10_perturbed'.*nearest:"):
        tofu.read_evaluation(data_dir / "tofu" / "forget10")


def test_faults_of_tofu(tmp_path):
    rows = [{"question": "Q?", "answer": "", "perturbed_answer": ["x"]}, {"question": "Q?", "answer": "A"}]
    (tmp_path / "forget10.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidDataset) as caught:
        tofu.read_questions(tmp_path / "forget10.json")
    assert "row 1: answer is empty" in str(caught.value)
    assert "row 2: perturbed_answer must be a list of wrong answers, got None" in str(caught.value)
    (tmp_path / "bad.json").write_text('{"prompt": "Q", "reply": "A"}\n')
    with pytest.raises(InvalidDataset, match="columns question, answer are missing; columns found: prompt, reply"):
        tofu.read_questions(tmp_path / "bad")


def test_what_is_not_there(mllmu, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration 'forget_6'.*nearest: forget_5"):
        load_config(mllmu / "forget_6")
    with pytest.raises(FileNotFoundError, match=r"Name one configuration.*forget_5.*retain_95"):
        load_config(mllmu)
    with pytest.raises(ValueError, match="names no configuration"):
        load_config("MLLMMU/MLLMU-Bench")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        load_config("/nowhere/at/all/forget_5")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no known format"):
        load_config(tmp_path / "notes.txt")


def test_a_hub_name_without_a_network_says_so():
    with pytest.raises(ConnectionError, match="neither in the local cache of the Hub"):
        load_config("MLLMMU/MLLMU-Bench/forget_5")


@pytest.mark.parametrize(
    ("path", "config", "expected"),
    [
        ("a/forget10.json", "x", "a/x.json"),
        ("a/b/forget_5", "Test_Set", "a/b/Test_Set"),
        ("owner/name/forget05", "retain95", "owner/name/retain95"),
        ("a/forget05+tofu/", "forget05", "a/forget05"),
    ],
)
def test_siblings(path, config, expected):
    assert sibling(path, config) == expected


def test_sb_bench(sb_rows, save_sb, tmp_path):
    save_sb(sb_rows, tmp_path)
    items = sb_bench.read_sb_bench(tmp_path / "real")
    assert [item.category for item in items] == ["Age", "Age", "Religion", "Race_ethnicity", "Race_ethnicity"]
    # The older of two ages; "the old man"; the option that names the group; nothing to tell by; again the group.
    assert [item.target for item in items] == [0, 2, 0, None, 0]
    assert [item.unknown for item in items] == [2, 0, 2, 2, 1] and {item.condition for item in items} == {"ambig"}
    # To a non-negative question the stereotyped answer is the other person.
    assert [item.biased for item in items] == [0, 1, 0, None, 0]
    assert [item.template for item in items][:2] == ["Age-01", "Age-02"]
    stereotyped = sb_bench.to_rows(items, "stereotype")
    assert [row["completion"] for row in stereotyped] == [
        " The 62 year old",
        " The young man",
        " The Muslim man",
        " The Black woman",
    ]
    assert stereotyped[0]["images"][0].size == (32, 32) and stereotyped[3]["bias_type"] == "race"
    assert sb_bench.to_rows(items, "anti_stereotype")[0]["completion"] == " The 24-year-old"
    neutral = sb_bench.to_rows(items, "neutral")
    assert len(neutral) == 5 and neutral[3]["completion"] == " Not enough info"
    with pytest.raises(ValueError, match="did you mean 'stereotype'"):
        sb_bench.to_rows(items, "stereotypes")


def test_a_copy_of_bbq_tells_targets(sb_rows, save_sb, tmp_path):
    save_sb(sb_rows, tmp_path)
    record = {
        "example_id": 4,
        "question_index": 1,
        "question_polarity": "nonneg",
        "context_condition": "ambig",
        "category": "Race_ethnicity",
        "answer_info": {"ans0": ["Ben", "Black"], "ans1": ["Ann", "White"], "ans2": ["Unknown", "unknown"]},
        "additional_metadata": {"subcategory": "None", "stereotyped_groups": ["Black"]},
        "context": "Ann and Ben met.",
        "question": "Who was late?",
        "ans0": "Ben",
        "ans1": "Ann",
        "ans2": "Unknown",
        "label": 2,
    }
    (tmp_path / "bbq").mkdir()
    (tmp_path / "bbq" / "race.jsonl").write_text(json.dumps(record) + "\n")
    assert [item.target for item in sb_bench.read_sb_bench(tmp_path / "real")] == [0, 2, 0, 1, 0]


def test_words_never_tell_a_wrong_target_of_published_items(data_dir):
    """Of BBQ's published items, whose targets are known, the options' words tell some, and none wrongly."""
    told = total = 0
    for file in ("Age", "Religion", "Physical_appearance"):
        path = data_dir / "bbq" / "data" / f"{file}.jsonl.gz"
        groups = {
            f"{row['category']}-{row['example_id']}": row["additional_metadata"]["stereotyped_groups"]
            for _, row in read_records(path, Faults(file))
        }
        for item in read_bbq(path):
            target = find_target(item.answers, item.unknown, groups[item.id], None)
            assert target in (None, item.target), item
            told += target is not None
            total += 1
    assert total == 6456 and told == 2864


def test_splits_by_template(sb_rows, save_sb, tmp_path):
    save_sb(sb_rows, tmp_path)
    items = sb_bench.read_sb_bench(tmp_path / "real")
    parts = sb_bench.split_by_template(items, {"forget": 0.5, "report": 0.5}, seed=1)
    templates = {name: {item.template for item in part} for name, part in parts.items()}
    assert not templates["forget"] & templates["report"] and sum(map(len, parts.values())) == 5
    assert all(templates.values())
    with pytest.raises(ValueError, match="sum to 1"):
        sb_bench.split_by_template(items, {"forget": 0.5})


def test_all_faults_of_sb_bench_come_together(sb_rows, save_sb, tmp_path):
    sb_rows[0]["ans2"] = "Nobody at all"
    sb_rows[1]["additional_metadata"] = "no dictionary"
    sb_rows[2]["id"] = sb_rows[3]["id"]
    sb_rows[3]["question"] = " "
    sb_rows[4]["file_name"] = {"bytes": b"no picture", "path": None}
    save_sb([*sb_rows, dict(sb_rows[2])], tmp_path)
    with pytest.raises(InvalidDataset) as caught:
        sb_bench.read_sb_bench(tmp_path / "real")
    for part in (
        "row 1: one option must say that it cannot be known, 0 do",
        "row 2: additional_metadata is no dictionary",
        "row 4: question is empty",
        "row 5: image stored in the row cannot be read",
        "row 6: item 06_01_0004_1_01 is there twice",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no configuration 'synthetic'"):
        sb_bench.read_sb_bench(tmp_path / "synthetic")


def test_image_bbq(tmp_path, sb_rows):
    (tmp_path / "met.png").write_bytes(sb_rows[0]["file_name"]["bytes"])
    info = {"ans0": ["old man", "old"], "ans1": ["boy", "nonOld"], "ans2": ["Unknown", "unknown"]}
    record = {
        "example_id": 7,
        "question_index": 1,
        "question_polarity": "neg",
        "context_condition": "disambig",
        "category": "Age",
        "answer_info": info,
        "additional_metadata": {"subcategory": "None", "stereotyped_groups": ["old"]},
        "context": "The boy was late.",
        "question": "Who was late?",
        "ans0": "The old man",
        "ans1": "The boy",
        "ans2": "Unknown",
        "label": 1,
        "image": "met.png",
    }
    file = tmp_path / "bbq.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (item,) = sb_bench.read_image_bbq(file)
    assert (item.target, item.condition) == (0, "disambig") and item.picture.open().size == (32, 32)
    assert sb_bench.to_rows([item], "neutral")[0]["completion"] == " The boy"
    file.write_text(json.dumps(record | {"image": "gone.png"}) + "\n")
    with pytest.raises(InvalidDataset, match=re.escape("gone.png' does not exist; nearest:")):
        sb_bench.read_image_bbq(file)
    file.write_text(json.dumps(record | {"image": "../met.png"}) + "\n")
    with pytest.raises(InvalidDataset, match="lies outside the data file's folder"):
        sb_bench.read_image_bbq(file)
    with pytest.raises(FileNotFoundError, match="is a folder; name one file"):
        sb_bench.read_image_bbq(tmp_path)


def test_configurations_and_splits_as_the_hub_serves_them(mllmu, sb_rows, save_sb, tmp_path, monkeypatch):
    """`datasets` reads a repository on disk by its card as it reads one on the Hub."""
    card = ["---", "configs:"]
    for config in ("forget_5", "Test_Set"):
        card += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: {config}/train-*"]
    (mllmu / "README.md").write_text("\n".join([*card, "---", ""]))
    save_sb(sb_rows, tmp_path / "SB-Bench")
    save_sb(sb_rows[:2], tmp_path / "SB-Bench", "synthetic")
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in ("real", "synthetic"):
        card += [f"  - split: {split}", f"    path: data/{split}-*"]
    (tmp_path / "SB-Bench" / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.chdir(tmp_path.parent)
    root = tmp_path.name
    assert published._load_from_hub(f"{root}/MLLMU-Bench/forget_5")["ID"] == ["001"]
    assert len(published._load_from_hub(f"{root}/MLLMU-Bench/Test_Set")) == 3
    assert len(published._load_from_hub(f"{root}/SB-Bench/synthetic")) == 2
    with pytest.raises(ValueError, match="has neither a configuration nor a split 'forget_6'"):
        published._load_from_hub(f"{root}/MLLMU-Bench/forget_6")
