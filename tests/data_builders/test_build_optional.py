"""Sources and splits that may be absent, and stages that ask for some rows alone."""

import json

import datasets
import PIL.Image
import pytest
import yaml

from biasunlearn_trainer.data_builders.build import build
from biasunlearn_trainer.data_builders.build_recipe import BuildRecipeError, read_build_recipe
from biasunlearn_trainer.data_builders.rows import rows_to_dataset
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.data_builders.stages import Outcome, row_key, run_stages


class Shout:
    """Writes completions in capitals, and counts what it was asked."""

    name, settings, batch_size = "shout", {}, 2

    def __init__(self, **attributes):
        self.asked = []
        vars(self).update(attributes)

    def key(self, row):
        return row_key(row, ("completion",))

    def do(self, rows):
        self.asked += [row["completion"] for row in rows]
        return [Outcome({"completion": row["completion"].upper()}) for row in rows]


@pytest.mark.parametrize("kept", [False, True])
def test_a_stage_asks_for_some_rows_and_keeps_the_order(tmp_path, kept):
    rows = [{"completion": f"word {n}", "kind": "ab"[n % 2]} for n in range(40)]
    stage = Shout(where={"kind": ["b"]}, keep_rows=kept)
    out = [row["completion"] for row in run_stages(rows, [stage], tmp_path, lambda reject: None)]
    assert stage.asked == [f"word {n}" for n in range(1, 40, 2)]
    expected = []
    for n in range(40):
        expected += [f"word {n}"] if n % 2 == 0 or kept else []
        expected += [f"WORD {n}"] if n % 2 else []
    assert out == expected


def write(folder, **changes):
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"p {n}", "completion": f"c {n}", "polarity": "neutral"}) + "\n" for n in range(4)
        )
    )
    recipe = {
        "name": "mine",
        "sources": [
            {"source": "rows", "path": str(folder / "rows.jsonl")},
            {"source": "pairs", "path": "${A_FOLDER_THAT_NOBODY_SET}/pairs", "optional": True},
            {"source": "rows", "path": str(folder / "gone.jsonl"), "optional": True},
        ],
        "splits": {
            "forget": {"where": {"polarity": "stereotype"}, "optional": True},
            "retain": {"where": {"polarity": "neutral"}},
        },
        "output_dir": str(folder / "out"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


def test_what_is_not_there_is_left_out_and_said(tmp_path, caplog):
    recipe = read_build_recipe(write(tmp_path))
    assert recipe.left_out == ["pairs", "rows"] and len(recipe.sources) == 1
    assert "Sources that were not there: pairs, rows." in caplog.text
    report = build(recipe, show_progress=False)
    assert list(report.splits) == ["retain"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Sources that were not there: pairs, rows." in card and "forget" not in card


def test_without_any_source_there_is_nothing_to_build(tmp_path):
    absent = [{"source": "rows", "path": str(tmp_path / "gone.jsonl"), "optional": True}]
    with pytest.raises(BuildRecipeError, match="none of those that it names is there: rows"):
        read_build_recipe(write(tmp_path, sources=absent))


def test_where_belongs_to_stages_that_ask(tmp_path):
    stages = [{"stage": "debias_benchmark", "where": {"kind": "facts"}}]
    with pytest.raises(BuildRecipeError, match="`where` belongs to a stage that asks for each row"):
        read_build_recipe(write(tmp_path, stages=stages))


def test_pictures_inside_a_parquet_file(tmp_path, monkeypatch):
    picture = PIL.Image.new("RGB", (6, 4), (1, 2, 3))
    rows = [{"prompt": f"p {n}", "completion": " c", "images": [picture]} for n in range(3)]
    rows_to_dataset(rows).to_parquet(tmp_path / "mine.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sources = [{"source": "rows", "path": str(tmp_path / "mine.parquet")}]
    build(read_build_recipe(write(tmp_path, sources=sources, splits={"all": {}})), show_progress=False)
    assert [row["images"][0].size for row in load_rows(tmp_path / "out/data/all.parquet")] == [(6, 4)] * 3
    assert len(list((tmp_path / "cache/biasunlearn_pictures").iterdir())) == 1, "one file a picture"
