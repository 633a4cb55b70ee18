"""A user's own file loads as it is, and a bad one says everything that is wrong with it."""

import gzip
import json

import datasets
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from biasunlearn_trainer.data_builders.rows import rows_to_dataset
from biasunlearn_trainer.data_builders.schema import InvalidDataset, validate_rows
from biasunlearn_trainer.data_builders.sources.plain import load_rows

IMAGES = List(Image())


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures of different sizes, so that a mix-up shows."""
    (tmp_path / "pics").mkdir()
    for name, size in (("a", 4), ("b", 6), ("c", 8)):
        PIL.Image.new("RGB", (size, size), "red").save(tmp_path / "pics" / f"{name}.png")
    return tmp_path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def sizes(dataset):
    return [[image.size[0] for image in row["images"] or []] for row in dataset]


def faults_of(path, **options):
    with pytest.raises(InvalidDataset) as caught:
        load_rows(path, **options)
    return caught.value


ROWS = [
    {"prompt": "Who?", "completion": " Ann", "images": "pics/a.png", "bias_type": "gender"},
    {"prompt": "Two?", "completion": " Both", "images": ["pics/b.png", "pics/c.png"]},
    {"prompt": "Text?", "completion": " Yes"},
]


def test_jsonl_takes_one_path_a_list_or_none(folder):
    dataset = load_rows(write_jsonl(folder / "rows.jsonl", ROWS))
    assert dataset.features["images"] == IMAGES
    assert sizes(dataset) == [[4], [6, 8], []]
    assert dataset["bias_type"][:] == ["gender", None, None]
    assert dataset["prompt"][:] == ["Who?", "Two?", "Text?"] and dataset["completion"][0] == " Ann"


def test_csv_gives_the_same_rows_as_jsonl(folder):
    text = (
        "prompt,completion,images,bias_type\n"
        "Who?, Ann,pics/a.png,gender\n"
        'Two?, Both,"[""pics/b.png"", ""pics/c.png""]",\n'
        "Text?, Yes,,\n"
    )
    (folder / "rows.csv").write_text("\ufeff" + text, encoding="utf-8")
    from_csv = load_rows(folder / "rows.csv")
    from_jsonl = load_rows(write_jsonl(folder / "rows.jsonl", ROWS))
    assert from_csv.features == from_jsonl.features
    assert from_csv.with_format("arrow")[:].to_pylist() == from_jsonl.with_format("arrow")[:].to_pylist()


@pytest.mark.parametrize("wrapped", [False, True])
def test_json_list_and_json_with_a_data_key(folder, wrapped):
    (folder / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS} if wrapped else ROWS))
    assert sizes(load_rows(folder / "rows.json")) == [[4], [6, 8], []]


def test_gzip(folder):
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS))
    assert len(load_rows(folder / "rows.jsonl.gz")) == 3


def test_parquet_with_paths_and_with_stored_pictures(folder):
    plain = [
        {**row, "images": [row["images"]] if isinstance(row.get("images"), str) else row.get("images")} for row in ROWS
    ]
    Dataset.from_list(plain).to_parquet(str(folder / "paths.parquet"))
    assert sizes(load_rows(folder / "paths.parquet")) == [[4], [6, 8], []]
    picture = PIL.Image.new("RGB", (5, 5))
    stored = Dataset.from_dict({"prompt": ["q"], "completion": ["a"], "images": [[picture]]})
    stored.cast_column("images", IMAGES).to_parquet(str(folder / "stored.parquet"))
    dataset = load_rows(folder / "stored.parquet")
    assert dataset.features["images"] == IMAGES and sizes(dataset) == [[5]]


def test_single_image_column_becomes_a_list(folder):
    rows = {"prompt": ["q", "r"], "completion": ["a", "b"], "image": [str(folder / "pics/b.png"), None]}
    features = Features({"prompt": Value("string"), "completion": Value("string"), "image": Image()})
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    dataset = load_rows(folder / "saved")
    assert dataset.column_names == ["prompt", "completion", "images"]
    assert dataset.features["images"] == IMAGES and sizes(dataset) == [[6], []]


def test_saved_dict_and_parquet_folder_have_splits(folder):
    splits = DatasetDict(
        {name: Dataset.from_list([{"prompt": name, "completion": " a"}]) for name in ("train", "test")}
    )
    splits.save_to_disk(str(folder / "saved"))
    assert load_rows(folder / "saved", "test")["prompt"][0] == "test"
    with pytest.raises(ValueError, match="no split 'dev'; splits there: train, test"):
        load_rows(folder / "saved", "dev")
    (folder / "built").mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / "built" / f"{name}.parquet"))
    assert load_rows(folder / "built", "test")["prompt"][0] == "test"


def test_folder_of_jsonl_takes_the_file_of_the_split(folder):
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": name, "completion": " a", "images": "pics/a.png"}])
    dataset = load_rows(folder, "test")
    assert dataset["prompt"][0] == "test" and sizes(dataset) == [[4]]
    with pytest.raises(ValueError, match=r"no one file for split 'dev'; files there: test.jsonl, train.jsonl"):
        load_rows(folder, "dev")


def test_text_set_has_no_images_column(folder):
    rows = [{"prompt": "q", "completion": " a", "images": None}, {"prompt": "q", "completion": " b", "images": []}]
    assert "images" not in load_rows(write_jsonl(folder / "t.jsonl", rows)).column_names
    Dataset.from_list(rows[:1]).cast_column("images", IMAGES).save_to_disk(str(folder / "saved"))
    assert "images" not in load_rows(folder / "saved").column_names


def test_chat_messages(folder):
    user = {"role": "user", "content": "Who?"}
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}
    answer = [{"role": "assistant", "content": "Ann"}]
    dataset = load_rows(write_jsonl(folder / "chat.jsonl", [{"prompt": [user], "completion": answer}]))
    assert dataset[0] == {"prompt": [user], "completion": answer}
    rows = [{"prompt": [user], "completion": answer}, {"prompt": [parts], "completion": answer, "images": "pics/a.png"}]
    dataset = load_rows(write_jsonl(folder / "mixed.jsonl", rows))
    contents = [[part["text"] for part in row["prompt"][0]["content"]] for row in dataset]
    assert contents == [["Who?"], [None, "Who?"]]


def test_pictures_are_decoded_when_read_not_before(folder):
    dataset = load_rows(write_jsonl(folder / "rows.jsonl", ROWS[:1]))
    PIL.Image.new("RGB", (9, 9)).save(folder / "pics/a.png")
    assert sizes(dataset) == [[9]]


def test_pictures_in_memory():
    dataset = rows_to_dataset([{"prompt": "q", "completion": " a", "images": PIL.Image.new("RGB", (3, 3))}])
    assert sizes(dataset) == [[3]]


def test_all_faults_come_together_with_file_and_row(folder):
    (folder / "pics/broken.png").write_bytes((folder / "pics/a.png").read_bytes()[:50])
    rows = [
        {"prompt": "q", "completion": "   "},
        {"prompt": "q", "completion": " a", "images": "pics/d.png"},
        {"prompt": "q", "completion": " a", "images": ["pics/broken.png"]},
        {"prompt": "q", "completion": " a", "bias_type": "Gendre", "polarity": "stereotyp"},
        {"prompt": None, "completion": " a"},
        {"prompt": "q", "completion": 4},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "completion": " a", "images": "http://example.org/a.png"},
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    path.write_text(path.read_text() + "\n\n{not json\n[1, 2]\n")
    error = faults_of(path)
    text = str(error)
    assert str(path) in text and error.num_faults == 11
    assert "line 1: `completion` is empty" in text
    assert "line 2: image " in text and "does not exist; nearest: " in text and "a.png" in text
    assert "line 3: image " in text and "cannot be read" in text and "broken.png" in text
    assert "line 4: unknown bias_type 'Gendre'; did you mean `gender`?" in text
    assert "line 4: unknown polarity 'stereotyp'; did you mean `stereotype`?" in text
    assert "line 5: `prompt` is missing (null)" in text
    assert "line 6: `completion` must be text or a list of chat messages, got int 4" in text
    assert "line 7: `prompt` is chat messages, but text in the rows before" in text
    assert "line 8: image 'http://example.org/a.png' is a URL" in text
    assert "line 10: not JSON" in text and "line 11: expected an object with named columns, got list" in text


def test_twenty_faults_are_shown_and_the_rest_counted(folder):
    error = faults_of(write_jsonl(folder / "rows.jsonl", [{"prompt": "q", "completion": ""}] * 33))
    assert error.num_faults == 33 and len(error.faults) == 20
    assert str(error).endswith("... and 13 more")


def test_missing_columns_are_named_with_the_nearest_found(folder):
    text = str(faults_of(write_jsonl(folder / "rows.jsonl", [{"question": "q", "Completion": " a", "bias_type": "x"}])))
    assert "no column `prompt`; columns found: question, Completion, bias_type; nearest: question" in text
    assert "no column `completion`" in text and "nearest: Completion" in text
    assert "unknown bias_type 'x'" in text
    with pytest.raises(InvalidDataset, match="no column `completion`; columns found: prompt"):
        validate_rows(Dataset.from_dict({"prompt": ["q"]}), "forget")


@pytest.mark.parametrize("name, text", [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt,completion\n")])
def test_no_rows(folder, name, text):
    (folder / name).write_text(text)
    assert "it has no rows" in str(faults_of(folder / name))


def test_csv_faults(folder):
    (folder / "a.csv").write_text('prompt,completion,images\nq, a\nq, a,"[""x"\nq,,\n')
    text = str(faults_of(folder / "a.csv"))
    assert "row 1: 2 cells, but the header names 3 columns" in text
    assert "row 2: `images` begins like a JSON list but is none" in text
    assert "row 3: `completion` is empty" in text
    (folder / "b.csv").write_text("prompt,completion,prompt\nq,a,r\n")
    assert "columns named twice: prompt" in str(faults_of(folder / "b.csv"))
    (folder / "c.csv").write_bytes("prompt,completion\né,a\n".encode("latin-1"))
    assert "not UTF-8" in str(faults_of(folder / "c.csv"))


def test_a_column_of_mixed_types_is_named(folder):
    rows = [{"prompt": "q", "completion": " a", "score": 1}, {"prompt": "q", "completion": " a", "score": {"x": 1}}]
    assert "column `score` mixes types" in str(faults_of(write_jsonl(folder / "a.jsonl", rows)))
    ids = [{"prompt": "q", "completion": " a", "pair_id": 1}, {"prompt": "q", "completion": " a", "pair_id": "b"}]
    assert load_rows(write_jsonl(folder / "b.jsonl", ids))["pair_id"][:] == ["1", "b"]


def test_relative_path_may_not_leave_the_folder(folder):
    inner = folder / "inner"
    inner.mkdir()
    rows = [{"prompt": "q", "completion": " a", "images": "../pics/a.png"}]
    path = write_jsonl(inner / "rows.jsonl", rows)
    text = str(faults_of(path))
    assert "line 1: image '../pics/a.png' lies outside the data file's folder" in text and "allow_outside" in text
    assert sizes(load_rows(path, allow_outside=True)) == [[4]]
    Dataset.from_list(rows).to_parquet(str(inner / "rows.parquet"))
    assert "row 1: image '../pics/a.png' lies outside" in str(faults_of(inner / "rows.parquet"))
    inside = write_jsonl(folder / "rows.jsonl", [{"prompt": "q", "completion": " a", "images": "inner/../pics/a.png"}])
    assert sizes(load_rows(inside)) == [[4]]
    absolute = write_jsonl(inner / "abs.jsonl", [{**rows[0], "images": str(folder / "pics/b.png")}])
    assert sizes(load_rows(absolute)) == [[6]]


def test_broken_picture_in_a_parquet_file(folder):
    rows = {"prompt": ["q", "q"], "completion": [" a", " a"], "images": [[{"bytes": b"no picture", "path": None}], []]}
    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": IMAGES})
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "a.parquet"))
    text = str(faults_of(folder / "a.parquet"))
    assert "row 1: image stored in the row cannot be read" in text
    assert len(load_rows(folder / "a.parquet", check_images=False)) == 2


def test_missing_file_names_the_nearest(folder):
    write_jsonl(folder / "forget.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"forgte\.jsonl' \(nearest there: forget\.jsonl\)"):
        load_rows(folder / "forgte.jsonl")
    with pytest.raises(FileNotFoundError, match=r"its folder .* does not exist"):
        load_rows(folder / "nowhere" / "forget.jsonl")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no known format; expected \.jsonl"):
        load_rows(folder / "notes.txt")
    with pytest.raises(ValueError, match="holds no data"):
        load_rows(folder / "pics")


def test_hub_set_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"No file or folder 'owner/set'.*neither in the local cache nor can the Hub"
    ):
        load_rows("owner/set")


def test_misspelt_optional_column_warns(folder, caplog):
    load_rows(write_jsonl(folder / "a.jsonl", [{"prompt": "q", "completion": " a", "bias_typ": "race"}]))
    assert "column `bias_typ` is not used; did you mean `bias_type`?" in caplog.text
