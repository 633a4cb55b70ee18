import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest

from biasunlearn_trainer.data_builders.schema import BIAS_TYPES, COLUMNS, InvalidDataset
from biasunlearn_trainer.data_builders.sources.stereoset import (
    StereoSetItem,
    check_disjoint,
    read_stereoset,
    split_by_target,
    to_rows,
    write_json,
)

HEADER = "prompt,choices,bias_type,target\n"
PARTS = {"train": 0.5, "probe": 0.2, "report": 0.3}


def write_csv(folder, *lines: str, name: str = "intrasentence_stereo_set.csv"):
    path = folder / name
    path.write_text(HEADER + "".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def json_item(context="He is BLANK.", labels=("stereotype", "anti-stereotype", "unrelated"), **changes) -> dict:
    sentences = [{"sentence": f"He is {n}.", "id": str(n), "gold_label": label} for n, label in enumerate(labels)]
    return {"id": "1", "target": "he", "bias_type": "gender", "context": context, "sentences": sentences, **changes}


def write_items(folder, *items: dict, task: str = "intrasentence"):
    path = folder / "items.json"
    path.write_text(json.dumps({"version": "1.1", "data": {task: list(items)}}), encoding="utf-8")
    return path


def faults_of(path) -> str:
    with pytest.raises(InvalidDataset) as caught:
        read_stereoset(path)
    return str(caught.value)


class TestRealFiles:
    def test_development_set(self, data_dir):
        items = read_stereoset(data_dir / "stereoset")
        assert Counter(item.task for item in items) == {"intrasentence": 2106, "intersentence": 2123}
        counts = Counter(item.bias_type for item in items if item.task == "intrasentence")
        assert counts == {"gender": 255, "profession": 810, "race": 962, "religion": 79}
        assert len({item.id for item in items}) == len(items)
        inside = [item for item in items if item.task == "intrasentence"]
        assert not any("BLANK" in text for i in inside for text in (i.stereotype, i.anti_stereotype, i.unrelated))

    def test_csv_agrees_with_the_labelled_json(self, data_dir):
        folder = data_dir / "stereoset"

        def content(item):
            texts = (item.context, item.stereotype, item.anti_stereotype, item.unrelated)
            return (item.bias_type, *(text.casefold() for text in texts))

        from_csv = {content(item) for item in read_stereoset(folder / "intrasentence_stereo_set.csv")}
        contexts = {entry[1] for entry in from_csv}
        labelled = [
            item
            for name in ("biasedit_splits/race_test", "biasedit_splits/religion_test", "biasedit_tracing/gender")
            for item in read_stereoset(folder / f"{name}.json.gz")
            if item.context.casefold() in contexts
        ]
        assert len(labelled) == 962 + 77 + 255
        assert sum(content(item) in from_csv for item in labelled) == len(labelled)

    @pytest.mark.parametrize(
        ("name", "count"),
        [("biasedit_splits/dev", 392), ("biasedit_tracing/gender", 1026), ("biasedit_tracing/race", 1446)],
    )
    def test_lists_of_items(self, data_dir, name, count):
        assert len(read_stereoset(data_dir / "stereoset" / f"{name}.json.gz")) == count

    def test_blank_inside_a_word_and_twice(self, data_dir):
        items = read_stereoset(data_dir / "stereoset" / "intrasentence_stereo_set.csv")
        sentences = {item.context: item.anti_stereotype for item in items}
        grandfather = next(text for context, text in sentences.items() if "BLANKed" in context)
        assert grandfather.split()[:3] == ["The", "grandfather", "attacked"]
        twice = [text for context, text in sentences.items() if context.count("BLANK") == 2]
        assert len(twice) == 2
        assert sum(text.split().count("organized") for text in twice) == 2

    def test_split_by_target_term(self, data_dir):
        items = read_stereoset(data_dir / "stereoset")
        parts = split_by_target(items, PARTS, seed=3)
        check_disjoint(parts)
        terms = [{item.target for item in part} for part in parts.values()]
        assert len(set.union(*terms)) == sum(map(len, terms)) == 79
        assert sum(map(len, parts.values())) == len(items)
        for part, fraction in PARTS.items():
            for bias_type in ("gender", "profession", "race"):
                share = sum(i.bias_type == bias_type for i in parts[part]) / sum(
                    i.bias_type == bias_type for i in items
                )
                assert share == pytest.approx(fraction, abs=0.06)
            assert any(item.bias_type == "religion" for item in parts[part])
        assert parts == split_by_target(items[:], PARTS, seed=3)
        assert parts["train"] != split_by_target(items, PARTS, seed=4)["train"]

    @pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
    def test_own_json_is_read_back(self, data_dir, tmp_path, name):
        items = read_stereoset(data_dir / "stereoset")
        items.sort(key=lambda item: item.task, reverse=True)
        write_json(items, tmp_path / name)
        assert read_stereoset(tmp_path / name) == items
        assert [file.name for file in tmp_path.iterdir()] == [name]


class TestParsing:
    def test_quotes_newlines_and_escapes_of_numpy(self, tmp_path):
        path = write_csv(
            tmp_path,
            '"I met him.","[\'He said ""no"".\'\n ""He\'s here."" \'Don\\\'t say ""yes"".\']",race,him',
            name="intersentence.csv",
        )
        (item,) = read_stereoset(path)
        assert item.stereotype == 'He said "no".'
        assert item.anti_stereotype == "He's here."
        assert item.unrelated == 'Don\'t say "yes".'
        assert (item.context, item.task, item.target) == ("I met him.", "intersentence", "him")

    def test_task_of_a_file_without_a_telling_name(self, tmp_path):
        inside = write_csv(tmp_path, "He is BLANK.,['a' 'b' 'c'],race,he", name="one.csv")
        between = write_csv(tmp_path, "He is here.,['A b.' 'C d.' 'E f.'],race,he", name="two.csv")
        assert read_stereoset(inside)[0].stereotype == "He is a."
        assert read_stereoset(between)[0].stereotype == "A b."

    def test_backslashes_in_a_choice_are_kept(self, tmp_path):
        (item,) = read_stereoset(write_csv(tmp_path, r"He is BLANK.,['a\\1' 'b' 'c'],race,he"))
        assert item.stereotype == r"He is a\1."

    def test_original_json_and_gzip(self, tmp_path):
        path = write_items(tmp_path, json_item(labels=("unrelated", "stereotype", "anti-stereotype")))
        expected = StereoSetItem(
            "1", "he", "gender", "intrasentence", "He is BLANK.", "He is 1.", "He is 2.", "He is 0."
        )
        assert read_stereoset(path) == [expected]
        packed = tmp_path / "packed.json.gz"
        packed.write_bytes(
            gzip.compress(json.dumps([json_item(labels=("unrelated", "stereotype", "anti-stereotype"))]).encode())
        )
        assert read_stereoset(packed) == [expected]

    def test_a_folder_reads_its_json_files_where_there_is_no_csv(self, tmp_path):
        write_items(tmp_path, json_item())
        assert len(read_stereoset(tmp_path)) == 1

    def test_repeated_items_are_kept_once(self, tmp_path, caplog):
        assert len(read_stereoset(write_items(tmp_path, json_item(), json_item()))) == 1
        assert "1 repeated" in caplog.text


class TestRefusals:
    def test_all_faults_of_a_csv_at_once(self, tmp_path):
        path = write_csv(
            tmp_path,
            "He is here.,['a' 'b' 'c'],race,he",
            "He is BLANK and BLANK.,['a' 'b' 'c'],race,he",
            "He is BLANK.,['a' 'b'],race,he",
            "He is BLANK.,a b c,race,he",
            "He is BLANK.,['a' 'b' 'c'],gendre,he",
            "He is BLANK.,['a' 'b' 'c'],race,",
            "She is BLANK.,['a' 'b' 'c'],race,she",
        )
        message = faults_of(path)
        for part in (
            "row 1: BLANK is missing",
            "row 2: BLANK stands 2 times, expected once",
            "row 3: `choices` must be a list of three quoted sentences, got 2",
            "row 4: `choices` must be a list of three quoted sentences, got no list",
            "row 5: unknown bias_type 'gendre'; did you mean 'gender'?",
            "row 6: target is empty",
        ):
            assert f"intrasentence_stereo_set.csv, {part}" in message
        assert "row 7" not in message

    def test_all_faults_of_a_json_at_once(self, tmp_path):
        path = write_items(
            tmp_path,
            json_item(context="He."),
            json_item(context="BLANK BLANK"),
            json_item(labels=("stereotype", "unrelated")),
            json_item(labels=("stereotype", "stereotype", "unrelated")),
            json_item(labels=("stereotype", None, "unrelated")),
            json_item(bias_type="species"),
            json_item(target=None),
            "nothing",
        )
        message = faults_of(path)
        for number, part in enumerate(
            (
                "BLANK is missing",
                "BLANK stands 2 times",
                "expected three sentences, got 2",
                "expected the gold labels stereotype, anti-stereotype, unrelated once each",
                "expected the gold labels",
                "unknown bias_type 'species'",
                "target missing",
                "expected an item, got str",
            ),
            start=1,
        ):
            assert f"items.json, intrasentence {number}: {part}" in message

    def test_swapped_labels(self, tmp_path):
        swapped = json_item()
        for sentence, said in zip(swapped["sentences"], ("anti-stereotype", "stereotype", "unrelated"), strict=True):
            sentence["labels"] = [{"label": said}, {"label": said}, {"label": "unrelated"}]
        assert "swapped against the annotators' labels" in faults_of(write_items(tmp_path, swapped))

    def test_columns_and_formats(self, tmp_path):
        path = tmp_path / "intra.csv"
        path.write_text("prompt,choices,target\nHe is BLANK.,['a' 'b' 'c'],he\n")
        assert "columns bias_type are missing" in faults_of(path)
        (tmp_path / "broken.json").write_text("{")
        assert "cannot be read as JSON" in faults_of(tmp_path / "broken.json")
        (tmp_path / "other.json").write_text('{"train": []}')
        assert 'expected {"data"' in faults_of(tmp_path / "other.json")
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(ValueError, match="no known format"):
            read_stereoset(tmp_path / "notes.txt")

    def test_nothing_there(self, tmp_path):
        (tmp_path / "stereoset").mkdir()
        with pytest.raises(FileNotFoundError, match="nearest there: stereoset"):
            read_stereoset(tmp_path / "stereset")
        with pytest.raises(FileNotFoundError, match="holds no StereoSet file"):
            read_stereoset(tmp_path / "stereoset")


def item(number: int, target: str, task: str = "intrasentence") -> StereoSetItem:
    context = "He is BLANK." if task == "intrasentence" else f"Context {number}."
    return StereoSetItem(str(number), target, "race", task, context, f"He is {number}.", f"Is {number}.", "Rain.")


class TestRowsAndSplits:
    def test_rows(self):
        inside, between = to_rows([item(0, "a"), item(1, "b", "intersentence")], "stereotype")
        assert inside == {
            "prompt": "",
            "completion": "He is 0.",
            "bias_type": "race",
            "polarity": "stereotype",
            "pair_id": "stereoset-0",
            "source": "stereoset",
            "source_id": "0",
        }
        assert (between["prompt"], between["completion"]) == ("Context 1.", " He is 1.")
        assert set(inside) < set(COLUMNS) and inside["bias_type"] in BIAS_TYPES

    def test_rows_of_several_polarities_share_a_pair(self):
        rows = to_rows([item(0, "a"), item(1, "b")], ["anti_stereotype", "unrelated"])
        assert [(row["pair_id"][-1], row["polarity"]) for row in rows] == [
            *(("0", "anti_stereotype"), ("0", "unrelated"), ("1", "anti_stereotype"), ("1", "unrelated")),
        ]
        with pytest.raises(ValueError, match="unknown polarity 'stereotypes'; did you mean 'stereotype'"):
            to_rows([item(0, "a")], "stereotypes")

    def test_one_term_never_parts_whatever_its_case(self):
        items = [item(n, target) for n, target in enumerate(["Arab", "arab", "Celt", "Celt ", "Dane", "Finn"])]
        parts = split_by_target(items, {"train": 0.5, "report": 0.5})
        folded = [{i.target.casefold().strip() for i in part} for part in parts.values()]
        assert folded[0].isdisjoint(folded[1])

    @pytest.mark.parametrize("fractions", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}])
    def test_fractions_are_checked(self, fractions):
        with pytest.raises(ValueError, match="Fractions must be positive and add up to 1"):
            split_by_target([item(0, "a"), item(1, "b")], fractions)

    def test_too_few_terms(self):
        with pytest.raises(ValueError, match="No target term is left for"):
            split_by_target([item(0, "a"), item(1, "a")], {"train": 0.5, "report": 0.5})

    def test_shared_terms_and_sentences_are_listed(self):
        first, second = item(0, "Arab"), item(1, "arab")
        third = replace(first, target="Celt", id="2")
        with pytest.raises(ValueError) as caught:
            check_disjoint({"train": [first], "report": [second, third]})
        assert "target 'arab' is in train and in report" in str(caught.value)
        assert "sentence 'He is 0.' is in train and in report" in str(caught.value)
