"""Builds from odd files, odd texts, odd seeds: a set as it should be, or a sentence that says what is wrong."""

import gzip
import json

import pytest
import yaml

from biasunlearn_trainer.data_builders.build import build, main
from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.data_builders.store import StoreError

ROWS = [{"prompt": f"Who was late on day {n}?", "completion": f" The {w}."} for n, w in enumerate(("nurse", "boy"))]


def write_recipe(folder, name="rows.jsonl", **changes):
    recipe = {
        "name": "odd",
        "sources": [{"source": "rows", "path": str(folder / name), "licence": "CC BY 4.0"}],
        "splits": {"train": {}},
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return folder / "recipe.yaml"


def built(folder, content, name="rows.jsonl", **changes):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    build(read_build_recipe(write_recipe(folder, name, **changes)), show_progress=False)
    return list(load_rows(folder / "out/data/train.parquet"))


def said(folder, capsys, content, name="rows.jsonl", **changes):
    """What the command says of a file that it refuses."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(write_recipe(folder, name, **changes))]) == 1
    assert not (folder / "out/README.md").exists()
    return capsys.readouterr().err


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_spreadsheets(tmp_path, mark, end):
    text = end.join(["prompt,completion", 'Who?,"The nurse, ""Ann"".', 'said she"', "Where?,Here.", ""])
    rows = built(tmp_path, mark + text, "rows.csv")
    assert [row["prompt"] for row in rows] == ["Who?", "Where?"]
    assert rows[0]["completion"] == f'The nurse, "Ann".{end}said she'


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_with_a_byte_order_mark_and_carriage_returns(tmp_path, packed):
    text = ("\ufeff" + lines(ROWS).replace("\n", "\r\n")).encode()
    name = "rows.jsonl.gz" if packed else "rows.jsonl"
    rows = built(tmp_path, gzip.compress(text) if packed else text, name)
    assert [row["completion"] for row in rows] == [" The nurse.", " The boy."]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", ""), ("rows.jsonl", "\n\n"), ("rows.csv", ""), ("rows.csv", "prompt,completion\n")],
)
def test_a_file_without_rows(tmp_path, capsys, name, content):
    assert f"{tmp_path / name} has no rows" in said(tmp_path, capsys, content, name)


def test_all_rows_left_out(tmp_path, capsys):
    rows = [{**row, "bias_type": "religion"} for row in ROWS]
    text = said(tmp_path, capsys, lines(rows), stages=[{"stage": "counterfactual"}])
    assert "no row came through the stages" in text
    assert "no_term 2" in text


def test_columns_named_twice(tmp_path, capsys):
    text = said(tmp_path, capsys, "prompt,completion,prompt\na,b,c\n", "rows.csv")
    assert "columns named twice: prompt" in text


def test_packed_and_not_named_so(tmp_path, capsys):
    text = said(tmp_path, capsys, gzip.compress(lines(ROWS).encode()))
    assert "rows.jsonl" in text and "gzip" in text and "rows.jsonl.gz" in text


@pytest.mark.parametrize("content", [lines(ROWS).encode(), gzip.compress(lines(ROWS * 50).encode())[:60]])
def test_named_packed_and_not_so(tmp_path, capsys, content):
    text = said(tmp_path, capsys, content, "rows.jsonl.gz")
    assert "rows.jsonl.gz" in text and "not a whole gzip file" in text
    assert "written" not in text


def test_another_encoding(tmp_path, capsys):
    text = said(tmp_path, capsys, json.dumps({"prompt": "é", "completion": "ü"}, ensure_ascii=False).encode("latin-1"))
    assert "rows.jsonl" in text and "not UTF-8" in text


TEXTS = (
    "שלום, מי איחר?",
    "من تأخر؟ \u202bأحمد\u202c",
    "👩🏽‍⚕️ was late 🏳️‍🌈",
    "e\u0301 and é",
    "İstanbul ﬁve ß",
    "日本語",
    "a\u2028b\u0085c",
    "a\x00b",
)


def test_every_script_comes_out_as_it_went_in(tmp_path):
    rows = [{"prompt": text, "completion": f" {text}", "note": text} for text in TEXTS]
    for name, content in (
        ("a.jsonl", lines(rows)),
        ("b.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)),
    ):
        found = built(tmp_path, content, name)
        assert [(row["prompt"], row["completion"], row["note"]) for row in found] == [(t, f" {t}", t) for t in TEXTS]


def test_scripts_pass_the_counterfactuals_and_the_comparison(tmp_path):
    rows = [{"prompt": text, "completion": " She left 👩🏽‍⚕️.", "bias_type": "gender"} for text in TEXTS]
    splits = {"train": {"part": "train"}, "report": {"part": "report"}}
    options = {"stages": [{"stage": "counterfactual"}], "splits": splits, "parts": {"train": 0.5, "report": 0.5}}
    found = [row["completion"] for row in built(tmp_path, lines(rows), on_leak="warn", **options)]
    assert found[:2] == [" She left 👩🏽‍⚕️.", " He left 👩🏽‍⚕️."]


def test_half_a_character(tmp_path, capsys):
    text = said(tmp_path, capsys, '{"prompt": "Who?", "completion": "\\ud83d late"}\n')
    assert "line 1" in text and "surrogate" in text


def test_a_row_of_a_megabyte(tmp_path):
    slow = "so that in the end they waited for the bus at the corner of the road by the lake until it was dark, " * 2
    long = f"She said that her aunt was late, {slow}and left. " * 4_200
    rows = [
        {"prompt": "", "completion": long, "bias_type": "gender"},
        *({**row, "bias_type": "gender"} for row in ROWS),
    ]
    found = built(tmp_path, lines(rows), stages=[{"stage": "counterfactual"}])
    assert len(found[0]["completion"]) > 1_000_000
    assert found[1]["completion"] == long.replace("She", "He").replace("her aunt", "his uncle")


@pytest.mark.parametrize("seed", [-1, -(2**40), 0, 2**31, 2**70])
def test_odd_seeds(tmp_path, seed):
    changes = {"seed": seed, "parts": {"a": 0.5, "b": 0.5}, "splits": {"train": {"part": "a", "limit": 3}}}
    text = lines({**ROWS[0], "pair_id": f"p{n}"} for n in range(20))
    first = built(tmp_path, text, **changes)
    assert len(first) == 3
    assert built(tmp_path, text, **changes) == first


@pytest.mark.parametrize("own_cache", [False, True])
def test_two_builds_of_one_folder(tmp_path, own_cache):
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    recipe = read_build_recipe(write_recipe(tmp_path))
    others = ["--cache_dir", str(tmp_path / "cache")] if own_cache else []
    other = read_build_recipe(tmp_path / "recipe.yaml", others)
    failed = []

    class WhileBuilding:
        name, settings = "while_building", {}

        def run(self, rows):
            with pytest.raises(StoreError, match="in use by another build") as err:
                build(other, show_progress=False)
            failed.append(err)
            yield from rows

    recipe.stages = [WhileBuilding()]
    report = build(recipe, show_progress=False)
    assert failed and report.splits["train"].num_rows == 2
    assert build(other, show_progress=False).splits["train"].num_rows == 2
