"""VLStereoSet, PATA, OK-VQA and image folders: rows of our own in exactly the published layouts."""

import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import PIL.Image
import pytest

from biasunlearn_trainer.data_builders.catalogue import SOURCES, sharing_fault
from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.data_builders.sources.image_folder import image_folder_rows
from biasunlearn_trainer.data_builders.sources.okvqa import okvqa_rows
from biasunlearn_trainer.data_builders.sources.pata import draw_bias_types, pata_rows, read_pata
from biasunlearn_trainer.data_builders.sources.vlstereoset import vlstereoset_rows

# As published: a byte order mark, their spelling, and a comma at the end of every line.
VLSTEREO_HEAD = "\ufeffbias_type,target,context,stereotype,anti-stereotype,unrelated,label,Imaeg URL,\n"
VLSTEREO_ROWS = (
    "race,Zorv,The Zorv is ,The Zorv is late,The Zorv is early,The Zorv is lettuce,1,https://example.org/a.jpg,\n"
    'gender,Mella,"Mella, she is ","Mella, she is slow","Mella, she is fast","Mella, she is soup",0,'
    "https://example.org/b.jpg?x=1,\n"
)


def picture(path, color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8), color).save(path)


@pytest.fixture
def vlstereoset(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "VLStereoSet.csv").write_text(VLSTEREO_HEAD + VLSTEREO_ROWS, encoding="utf-8")
    picture(tmp_path / "images" / "0.jpg")
    picture(tmp_path / "images" / "1.png")
    return tmp_path


def test_vlstereoset(vlstereoset):
    rows = vlstereoset_rows(str(vlstereoset))
    assert [(row["polarity"], row["completion"], row["rejected"]) for row in rows[:3]] == [
        ("stereotype", " The Zorv is late", None),
        ("anti_stereotype", " The Zorv is early", " The Zorv is late"),
        ("unrelated", " The Zorv is lettuce", None),
    ]
    assert [row["picture_shows"] for row in rows[::3]] == ["anti_stereotype", "stereotype"]
    assert rows[3]["completion"] == " Mella, she is slow" and rows[3]["target"] == "mella"
    assert [Path(row["images"][0]).name for row in rows[::3]] == ["0.jpg", "1.png"]
    assert {row["pair_id"] for row in rows} == {"vlstereoset-0", "vlstereoset-1"}
    by_file = vlstereoset_rows(str(vlstereoset / "data/VLStereoSet.csv"), pictures=str(vlstereoset / "images"))
    assert by_file == rows


def test_pictures_that_are_gone_are_left_out(vlstereoset, caplog):
    # What a dead address gives: a page.
    (vlstereoset / "images" / "0.jpg").write_text("<html>not found</html>")
    with caplog.at_level(logging.WARNING):
        rows = vlstereoset_rows(str(vlstereoset))
    assert {row["source_id"] for row in rows} == {"1"}
    assert "1 of 2 rows have a picture; 0 have no file, 1 files do not open" in caplog.text
    (vlstereoset / "images" / "1.png").unlink()
    with pytest.raises(InvalidDataset, match=r"no picture in .* opens: 1 are named"):
        vlstereoset_rows(str(vlstereoset))


def test_faults_of_vlstereoset_come_together(vlstereoset):
    file = vlstereoset / "data" / "VLStereoSet.csv"
    file.write_text(VLSTEREO_HEAD + "rase,Zorv,x ,a,b,c,2,u,\nrace,Zorv,x ,,b,c,0,u,\n", encoding="utf-8")
    with pytest.raises(InvalidDataset) as err:
        vlstereoset_rows(str(vlstereoset))
    assert err.value.num_faults == 3
    for said in ("row 1: unknown bias_type 'rase'; did you mean `race`?", "got '2'", "row 2: `stereotype` is empty"):
        assert said in str(err.value)
    file.write_text("bias_type,target\nrace,Zorv\n")
    with pytest.raises(InvalidDataset, match=r"columns context, stereotype, .*, Imaeg URL are missing"):
        vlstereoset_rows(str(vlstereoset))
    with pytest.raises(FileNotFoundError, match="expected the repository of VLStereoSet"):
        vlstereoset_rows(str(vlstereoset / "images"))


def test_two_pictures_of_a_row(vlstereoset):
    picture(vlstereoset / "images" / "1.jpg")
    with pytest.raises(InvalidDataset, match=r"1\.jpg and 1\.png are both pictures of row 1"):
        vlstereoset_rows(str(vlstereoset))


SCENES = [
    {
        "long": "photo of {age}, {race} {gender} in a tram",
        "short": "night_tram",
        "pos": {"races": ["photo of a traveller", "photo of a friend"], "gender": ["photo of a boss"], "age": ["p"]},
        "neg": {"races": ["photo of a thief"], "gender": ["photo of a gossip"], "age": ["photo of a bore"]},
    },
    {
        "long": "photo of a young {race} {{gender}} diver",
        "short": "diver",
        "pos": {"races": ["photo of a hero"], "gender": ["photo of a star"], "age": []},
        "neg": {"races": ["photo of a smuggler"], "gender": [], "age": []},
    },
]


@pytest.fixture
def pata(tmp_path):
    (tmp_path / "pata_fairness.captions.json").write_text(json.dumps(SCENES))
    lines = [f"night_tram_{race}_female_old|https://example.org/{race}?a|b" for race in ("black", "eastasian")]
    lines += [f"diver_indian_male_young|https://example.org/{n}" for n in range(4)]
    (tmp_path / "pata_fairness.files.lst").write_text("\n".join(lines) + "\n")
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png")
    return tmp_path


def test_pata(pata):
    rows = pata_rows(str(pata), seed=3)
    assert len(rows) == 12 and [row["polarity"] for row in rows[:2]] == ["stereotype", "anti_stereotype"]
    by_id = {row["source_id"]: row for row in rows if row["polarity"] == "anti_stereotype"}
    # The diver's scene has captions of both kinds for race alone.
    assert [by_id[str(n)]["bias_type"] for n in range(2, 6)] == ["race"] * 4
    assert by_id["2"]["completion"] == " photo of a hero" and by_id["2"]["rejected"] == " photo of a smuggler"
    assert by_id["0"]["scene_prompt"] == "photo of old, black female in a tram"
    assert by_id["2"]["scene_prompt"] == "photo of a young indian male diver"
    assert pata_rows(str(pata), seed=3) == rows


def test_counts_of_pata(pata):
    # Both trams can stand for age; the quota of age goes first, since no other scene can fill it.
    drawn = Counter(draw_bias_types(*read_pata(pata)[:2], counts={"race": 3, "gender": 5, "age": 1}).values())
    assert drawn == {"age": 1, "gender": 1, "race": 3}
    rows = pata_rows(str(pata), counts={"age": 1})
    assert len(rows) == 2 and rows[0]["completion"] == " photo of a bore"
    with pytest.raises(ValueError, match=r"`counts` must be 0 or more of race, gender, age, got \{'size': 1\}"):
        pata_rows(str(pata), counts={"size": 1})


def test_every_type_is_drawn_equally_often(pata):
    read, captions, _ = read_pata(pata)
    drawn = Counter(draw_bias_types(read[:1], captions, seed)[0] for seed in range(600))
    # 200 of each are expected, with a standard deviation of 11.5.
    assert all(150 < drawn[bias] < 250 for bias in ("age", "gender", "race"))


def test_faults_of_pata_come_together(pata):
    lines = ["night_trm_black_female_old|u", "night_tram_green_female_old|u", "night_tram_black_female_old"]
    (pata / "pata_fairness.files.lst").write_text("\n".join(lines))
    with pytest.raises(InvalidDataset) as err:
        pata_rows(str(pata))
    assert err.value.num_faults == 3
    for said in ("nearest: night_tram", "line 2: unknown label 'green'", "line 3: expected SCENE_RACE_GENDER_AGE"):
        assert said in str(err.value)
    (pata / "pata_fairness.captions.json").write_text(json.dumps([{"short": "diver"}]))
    with pytest.raises(InvalidDataset, match="scene 1: expected long, short, pos and neg"):
        pata_rows(str(pata))
    (pata / "pata_fairness.captions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no pata_fairness.captions.json"):
        pata_rows(str(pata))


def answer(number, text):
    return {"answer_id": number, "raw_answer": text, "answer_confidence": "yes", "answer": text}


ANSWERS = ["rain", "snow", "snow", "rain", "snow"]


@pytest.fixture
def okvqa(tmp_path):
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions = [{"image_id": 42, "question": "What falls? ", "question_id": 425}]
    note = {"image_id": 42, "answer_type": "other", "question_type": "four", "question_id": 425, "confidence": 3}
    notes = [{**note, "answers": [answer(n, text) for n, text in enumerate(ANSWERS, start=1)]}]
    (tmp_path / "OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({**head, "questions": questions}))
    (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps({**head, "annotations": notes}))
    picture(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    return tmp_path


def test_okvqa(okvqa):
    (row,) = okvqa_rows(str(okvqa))
    assert (row["prompt"], row["completion"]) == ("Question: What falls? Answer:", " snow")
    assert Path(row["images"][0]).name == "COCO_val2014_000000000042.jpg" and row["answers"] == ANSWERS
    assert (row["source_id"], row["kind"]) == ("425", "perception")
    with pytest.raises(ValueError, match=r"must hold {question} once"):
        list(okvqa_rows(str(okvqa), prompt="What?"))


def test_faults_of_okvqa_come_together(okvqa):
    (okvqa / "val2014" / "COCO_val2014_000000000042.jpg").write_bytes(b"no picture")
    (okvqa / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [{"question_id": 1}]}))
    with pytest.raises(InvalidDataset) as err:
        list(okvqa_rows(str(okvqa)))
    assert "question 1: expected a list of answers, got None" in str(err.value) and "cannot be read" in str(err.value)
    (okvqa / "mscoco_val2014_annotations.json").unlink()
    with pytest.raises(InvalidDataset, match=r"there is no .*mscoco_val2014_annotations.json"):
        list(okvqa_rows(str(okvqa)))


@pytest.mark.parametrize("as_texts", [True, False], ids=["lmms-lab", "with dictionaries"])
def test_okvqa_as_parquet(okvqa, tmp_path, as_texts):
    published = [answer(n, text) for n, text in enumerate(ANSWERS, start=1)]
    columns = {
        "question_id": ["425"],
        "image": [PIL.Image.new("RGB", (8, 8))],
        "question": ["What falls?"],
        "answers": [ANSWERS if as_texts else published],
        "question_type": ["four"],
        "answer_type": ["other"],
    }
    table = datasets.Dataset.from_dict(columns)
    file = tmp_path / "val2014.parquet"
    table.to_parquet(str(file))
    (row,) = okvqa_rows(str(file), pictures=str(tmp_path / "written"))
    assert row["completion"] == " snow" and row["source_id"] == "425"
    with PIL.Image.open(row["images"][0]) as opened:
        assert opened.size == (8, 8)
    assert Path(row["images"][0]).parent == tmp_path / "written"
    json.dumps(row)  # builds keep rows as JSON between two passes
    table.remove_columns("question").to_parquet(str(file))
    with pytest.raises(InvalidDataset, match="columns question are missing"):
        list(okvqa_rows(str(file)))


def test_image_folder(tmp_path):
    picture(tmp_path / "set" / "pictures" / "1.png")
    table = tmp_path / "set" / "metadata.csv"
    table.write_text("file_name,prompt,completion,bias_type\npictures/1.png,Who?, Ann,gender\n")
    (row,) = image_folder_rows(str(tmp_path / "set"))
    assert row["images"] == [str(tmp_path / "set" / "pictures" / "1.png")]
    assert (row["prompt"], row["completion"], row["bias_type"]) == ("Who?", " Ann", "gender")
    assert (row["source"], row["source_id"]) == ("set", "pictures/1.png")
    table.write_text("file_name,text\npictures/1.png,A cat.\n")
    (row,) = image_folder_rows(str(tmp_path / "set"), prompt="Describe the picture.", completion="text")
    assert (row["prompt"], row["completion"]) == ("Describe the picture.", "A cat.")


def test_real_pictures_and_their_labels(data_dir):
    folder = str(data_dir / "noto_emoji_people")
    rows = list(image_folder_rows(folder, picture="file", completion="role", prompt="What does the person do?"))
    assert len(rows) == 516 and len({row["images"][0] for row in rows}) == 516
    assert rows[0]["skin_tone"] and rows[0]["source"] == "noto_emoji_people"
    with pytest.raises(InvalidDataset, match="no column `file_name` with the pictures; columns found: file"):
        list(image_folder_rows(folder))


def test_faults_of_image_folders(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(FileNotFoundError, match="no folder of pictures"):
        list(image_folder_rows(str(folder)))
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"needs one table .*metadata\.csv; tables there: none"):
        list(image_folder_rows(str(folder)))
    (folder / "metadata.csv").write_text("file_name,prompt,completion\n1.png,Who?,Ann\n../2.png,Who?,Bob\n,Who?,\n")
    with pytest.raises(InvalidDataset) as err:
        list(image_folder_rows(str(folder)))
    for said in ("does not exist", "lies outside", "row 3: `file_name` is empty", "`completion` is empty"):
        assert said in str(err.value)
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"tables there: metadata\.csv, metadata\.jsonl"):
        list(image_folder_rows(str(folder)))


def test_pictures_of_others_are_not_passed_on():
    for name in ("vlstereoset", "pata", "okvqa"):
        assert "forbids to pass on" in sharing_fault(SOURCES[name].licence)
    assert sharing_fault(SOURCES["nq_open"].licence) is None
