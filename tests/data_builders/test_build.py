"""Builds from recipes: what is written, what is checked, what a kill leaves, and what bad input is answered."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from biasunlearn_trainer.data_builders import build as building
from biasunlearn_trainer.data_builders.assemble import BuildError
from biasunlearn_trainer.data_builders.build_recipe import BuildRecipeError, read_build_recipe
from biasunlearn_trainer.data_builders.catalogue import SOURCES, STAGES, sharing_fault
from biasunlearn_trainer.data_builders.contact_sheet import row_label
from biasunlearn_trainer.data_builders.parts import deal_groups
from biasunlearn_trainer.data_builders.sources.plain import load_rows

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "data"
SERVER = Path(__file__).with_name("chat_server.py")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(num, tag=""):
    people = ("the nurse", "the old man", "the girl", "my brother")
    return [
        {
            "prompt": f"On day {n}{tag}, who was late, {people[n % 4]} or a friend?",
            "completion": f" {people[n % 4]}." if n % 2 else " It cannot be known.",
            "bias_type": ("age", "gender")[n % 2],
            "polarity": ("neutral", "stereotype")[n % 2],
            "pair_id": f"pair {n // 2}",
        }
        for n in range(num)
    ]


def write_recipe(folder, **changes):
    recipe = {
        "name": "mine",
        "sources": [{"source": "rows", "path": str(folder / "rows.jsonl"), "licence": "CC BY 4.0"}],
        "parts": {"train": 0.75, "report": 0.25},
        "splits": {
            "forget": {"part": "train", "where": {"polarity": "stereotype"}},
            "retain": {"part": "train", "where": {"polarity": "neutral"}},
            "report": {"part": "report"},
        },
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return path


def built(folder, rows=None, **changes):
    write_rows(folder / "rows.jsonl", questions(80) if rows is None else rows)
    recipe = read_build_recipe(write_recipe(folder, **changes))
    return building.build(recipe, show_progress=False)


def test_a_built_set_is_read_by_datasets_and_by_training(tmp_path):
    report = built(tmp_path)
    sets = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 30, "retain": 30, "report": 20}
    forget = load_rows(tmp_path / "out/data/forget.parquet")
    assert set(forget["polarity"]) == {"stereotype"}
    assert sorted(forget["prompt"]) == sorted(sets["forget"]["prompt"])
    groups = [set(sets[name]["part_group"]) for name in ("forget", "retain", "report")]
    assert groups[0] == groups[1]
    assert not groups[0] & groups[2]
    # Both bias types are in each part in its share: 80 rows, half of each type, pairs of one of each.
    assert report.splits["report"].bias_types == {"age": 10, "gender": 10}


def test_the_card_says_what_is_in_it(tmp_path):
    rows = [*questions(80), {**questions(1)[0], "prompt": "Who was late, the nurse?", "bias_type": None}]
    built(
        tmp_path, rows, description="A set of mine.", splits={"forget": {"part": "train"}, "report": {"part": "report"}}
    )
    card = (tmp_path / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["configs"][0]["data_files"][0] == {"split": "forget", "path": "data/forget.parquet"}
    for text in (
        "A set of mine.",
        "| forget | 61 | `",
        "| age | 30 | 10 |",
        "| none | 1 | 0 |",
        "| Rows of a file, a folder or a Hub set | CC BY 4.0 | 81 |",
        "0 row(s) of forget and report are the same",
        "seed 0",
    ):
        assert text in card, text
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert record["recipe"]["parts"] == {"train": 0.75, "report": 0.25}
    assert record["report"]["splits"]["forget"]["num_rows"] == 61
    assert {"python", "datasets"} <= set(record["versions"])


def test_a_contact_sheet_counts_the_rows_of_each_bias_type():
    assert row_label({"bias_type": "age", "polarity": "neutral"}, {"age": 20}) == "age (n = 20) neutral"
    assert row_label({"bias_type": "age"}, {}) == "age"
    assert row_label({"polarity": "neutral"}, {"none": 3}) == "neutral"


def test_a_build_is_a_function_of_recipe_and_seed(tmp_path):
    def prints(name, **changes):
        (tmp_path / name).mkdir()
        return {split: r.fingerprint for split, r in built(tmp_path / name, **changes).splits.items()}

    first = prints("a")
    assert prints("b") == first
    assert prints("c", seed=1) != first
    shuffled = questions(80)
    random.Random(0).shuffle(shuffled)
    (tmp_path / "d").mkdir()
    groups = [{r["part_group"] for r in load_rows(tmp_path / f"{n}/out/data/report.parquet")} for n in "ab"]
    built(tmp_path / "d", shuffled)
    groups.append({r["part_group"] for r in load_rows(tmp_path / "d/out/data/report.parquet")})
    assert groups[0] == groups[1] == groups[2]


def test_groups_are_dealt_whole_and_evenly():
    sizes = [1 + n % 5 for n in range(100)]
    parts = deal_groups(sizes, [size % 2 for size in sizes], {"a": 0.5, "b": 0.3, "c": 0.2}, seed=3)
    shares = Counter()
    for size, part in zip(sizes, parts, strict=True):
        shares[part] += size
    assert shares.total() == 300
    assert all(abs(shares[part] - want) <= 5 for part, want in (("a", 150), ("b", 90), ("c", 60)))


def test_limits_draw_by_the_seed(tmp_path):
    report = built(tmp_path, splits={"forget": {"limit": 7}})
    assert report.splits["forget"].num_rows == 7
    report = built(tmp_path, sources=[{"source": "rows", "path": str(tmp_path / "rows.jsonl"), "limit": 9}],
                   splits={"forget": {}})  # fmt: skip
    assert report.splits["forget"].num_rows == 9


def test_leaks_and_near_duplicates_are_found(tmp_path):
    same = [{**r, "pair_id": f"copy {n}"} for n, r in enumerate(questions(40))]
    rows = [*questions(40), *same]
    with pytest.raises(ValueError, match="report set are in the trained set too"):
        built(tmp_path, rows, splits={"forget": {"part": "train"}, "report": {"part": "report"}})
    assert not (tmp_path / "out/README.md").exists()
    report = built(tmp_path, rows, splits={"forget": {"part": "train"}, "report": {"part": "report"}}, on_leak="warn")
    shared = report.leaks["forget and report"]
    # Of 40 pairs of copies, each in a group of its own, those whose copies are in both parts.
    parts = [{r["prompt"] for r in load_rows(tmp_path / f"out/data/{n}.parquet")} for n in ("forget", "report")]
    assert shared == len(parts[0] & parts[1]) > 0
    assert f"{shared} row(s) of forget and report are the same" in (tmp_path / "out/README.md").read_text()
    # Dropped as near duplicates, they leak no more, and stand among the rejects.
    report = built(
        tmp_path, rows, splits={"forget": {"part": "train"}, "report": {"part": "report"}}, on_near_duplicate="drop"
    )
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert report.leaks["forget and report"] == 0
    assert report.rejects == {"splits": {"near duplicate": len(rejects)}}
    assert len(rejects) >= shared
    with pytest.raises(BuildError, match=r"nearly rows of report; set `on_near_duplicate: drop`"):
        built(tmp_path, rows, on_near_duplicate="raise")


def test_duplicates_are_counted_or_dropped(tmp_path):
    rows = [*questions(10), questions(10)[0]]
    assert built(tmp_path, rows, splits={"all": {}}).duplicates == {"all": 1}
    report = built(tmp_path, rows, splits={"all": {}}, drop_duplicates=True)
    assert (report.splits["all"].num_rows, report.rejects) == (10, {"splits": {"duplicate": 1}})


def test_a_split_without_rows_says_why(tmp_path):
    with pytest.raises(BuildError, match=r"none has polarity 'anti_stereotype'; values there: (neutral|stereotype)"):
        built(tmp_path, splits={"forget": {"where": {"polarity": "anti_stereotype"}}})


def test_all_faults_of_a_recipe_come_at_once_with_their_lines(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: my set\n"
        "sources:\n"
        "  - source: stereoste\n"
        "    path: a\n"
        "  - source: rows\n"
        f"    path: {tmp_path}/nowhere.jsonl\n"
        "    limt: 3\n"
        "  - source: rows\n"
        "    path: ${NO_SUCH_VARIABLE}/x.jsonl\n"
        "stages:\n"
        "  - stage: rephrase_text\n"
        "    model: m\n"
        "    base_url: http://localhost/v1\n"
        "    api_key: sk-123\n"
        "    concurrency: many\n"
        "parts: {train: 0.5, report: 0.4}\n"
        "splits:\n"
        "  forget: {part: trian}\n"
        "seed: 1\n"
        "seed: 2\n"
    )
    with pytest.raises(BuildRecipeError) as caught:
        read_build_recipe(path, ["--on_leak", "ignore"])
    text = str(caught.value)
    for part in (
        ":3: `source` is 'stereoste', expected one of",
        "did you mean `stereoset`?",
        f":6: there is no source at '{tmp_path}/nowhere.jsonl'",
        ":7: unknown key `limt` (did you mean `limit`?)",
        ":9: `path` needs the environment variable NO_SUCH_VARIABLE",
        ":14: unknown key `api_key`",
        "a secret does not belong into a recipe",
        ":15: `concurrency` is 'many', expected a whole number",
        ":20: `seed` is set twice, first at",
        "command line: `on_leak` is 'ignore', expected one of raise, warn",
        ":16: `parts` must be positive and sum to 1",
        ":18: there is no part 'trian' (did you mean `train`?)",
        ":1: `name` is 'my set'",
    ):
        assert part in text, f"{part}\n{text}"
    assert "sk-123" not in text


def test_the_command_line_overrides_by_dots(tmp_path):
    write_rows(tmp_path / "other.jsonl", questions(4))
    words = [
        "--sources.0.path",
        str(tmp_path / "other.jsonl"),
        "--seed=7",
        "--splits.forget.limit",
        "2",
        "--parts.train",
        "1.0",
    ]
    recipe = write_recipe(tmp_path, parts={"train": 0.5}, splits={"forget": {"part": "train"}})
    read = read_build_recipe(recipe, words)
    assert (read.seed, read.sources[0].path, read.splits["forget"].limit) == (7, words[1], 2)
    with pytest.raises(BuildRecipeError, match=r"there is no 3; the list has 0 to 0"):
        read_build_recipe(recipe, ["--sources.3.path", "x"])


def test_broken_rows_and_a_missing_source_are_named(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    assert building.main([str(write_recipe(tmp_path))]) == 1
    assert "no column `completion`" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").unlink()
    assert building.main([str(tmp_path / "recipe.yaml")]) == 1
    assert "there is no source at" in capsys.readouterr().err
    assert building.main([str(tmp_path / "none.yaml")]) == 1
    assert "no such recipe (did you mean `recipe.yaml`?)" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_names_known_sources_and_stages(path):
    recipe = yaml.safe_load(path.read_text())
    assert {source["source"] for source in recipe["sources"]} <= set(SOURCES)
    assert {stage["stage"] for stage in recipe.get("stages", [])} <= set(STAGES)


@pytest.mark.parametrize(
    ("licence", "word"),
    [(None, "not stated"), ("CC BY-ND 4.0", "forbids"), ("research only", "forbids"), ("Mitigated", "not known")],
)
def test_what_may_not_be_passed_on_is_not_pushed(tmp_path, capsys, licence, word):
    write_rows(tmp_path / "rows.jsonl", questions(8))
    source = {"source": "rows", "path": str(tmp_path / "rows.jsonl")} | ({"licence": licence} if licence else {})
    path = write_recipe(tmp_path, sources=[source])
    assert building.main([str(path), "--push_to_hub", "me/mine"]) == 1
    said = capsys.readouterr().err
    assert "cannot be pushed to the Hub" in said
    assert word in said
    assert (licence or "licence") in said
    # It is refused before anything is built or paid for.
    assert not (tmp_path / "out").exists()


def test_licences_that_allow_it():
    for licence in ("CC BY 4.0", "cc-by-sa-4.0", "CC0 1.0", "MIT", "Apache-2.0", "CC BY-NC-SA 4.0"):
        assert sharing_fault(licence) is None, licence


def test_a_full_disk_is_said_and_the_old_set_stays(tmp_path):
    built(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    write_rows(tmp_path / "rows.jsonl", questions(400))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from biasunlearn_trainer.data_builders.build import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "run the same command again" in done.stderr
    kept = {p: p.read_bytes() for p in before if p.exists()}
    assert kept == before
    assert built(tmp_path, questions(400)).splits["report"].num_rows == 100


def test_preview_shows_rows_and_writes_no_set(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", questions(30))
    assert building.main([str(write_recipe(tmp_path)), "--preview", "3"]) == 0
    shown = capsys.readouterr().out
    assert [f"On day {n}," in shown for n in range(4)] == [True, True, True, False]
    assert not (tmp_path / "out/README.md").exists()
    assert building.main([str(tmp_path / "recipe.yaml"), "--preview", "0"]) == 1


# A build with the HTTP paraphraser, killed.


@pytest.fixture
def chat_process(tmp_path):
    log = tmp_path / "answers.log"
    log.touch()
    process = subprocess.Popen([sys.executable, str(SERVER), "0", str(log)], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip(), log
    finally:
        process.kill()
        process.wait()


def stored_texts(folder):
    lines = [line for path in folder.rglob("rephrase_text-*.jsonl") for line in path.read_bytes().splitlines(True)]
    return {json.loads(line)["key"] for line in lines if line.endswith(b"\n")}


def paraphrased(folder, url, rows):
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    stage = {"stage": "rephrase_text", "model": "m", "base_url": url, "concurrency": 4}
    return write_recipe(folder, stages=[stage])


def kill_builds(tmp_path, chat_process, num_kills, num_rows):
    url, log = chat_process
    rows = questions(num_rows)
    quiet = read_build_recipe(paraphrased(tmp_path / "quiet", url, rows))
    undisturbed = building.build(quiet, show_progress=False)
    asked_once = Counter(log.read_text().splitlines())
    assert set(asked_once.values()) == {1}
    log.write_text("")
    recipe = paraphrased(tmp_path / "killed", url, rows)
    out, rng = tmp_path / "killed/out", random.Random(num_kills)
    command = [sys.executable, "-m", "biasunlearn_trainer.data_builders.build", str(recipe)]
    kills = 0
    for number in range(num_kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = len(stored_texts(out)) + rng.randint(1, max(1, num_rows // (num_kills + 1)))
        while process.poll() is None and len(stored_texts(out)) < target:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        # What was answered and stored must not be asked again: at most the requests under way may be.
        answered = Counter(log.read_text().splitlines())
        assert answered.total() <= len(stored_texts(out)) + 4 * (number + 1)
    assert kills == num_kills
    stored_before, answered_before = len(stored_texts(out)), Counter(log.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answered = Counter(log.read_text().splitlines())
    assert answered.total() - answered_before.total() == len(asked_once) - stored_before
    assert answered.total() <= len(asked_once) + 4 * num_kills
    report = json.loads((out / "build.json").read_text())["report"]
    for name, split in undisturbed.splits.items():
        assert report["splits"][name]["fingerprint"] == split.fingerprint
    # Some texts are asked for twice or three times, since the server says them back; the rejected ones three times.
    rejects = (out / "rejects.jsonl").read_text()
    assert rejects == (tmp_path / "quiet/out/rejects.jsonl").read_text()
    rejects = [json.loads(line) for line in rejects.splitlines()]
    assert all((r["reason"], r["attempts"]) == ("not different", 3) for r in rejects)
    assert sum(split.num_rows for split in undisturbed.splits.values()) + len(rejects) == num_rows
    assert report["stages"][0]["attempts"] == len(asked_once) > num_rows


needs_openai = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


@needs_openai
def test_a_build_that_is_killed_twice_ends_the_same(tmp_path, chat_process):
    kill_builds(tmp_path, chat_process, 2, 60)


@needs_openai
@pytest.mark.slow
def test_a_build_that_is_killed_ten_times_ends_the_same(tmp_path, chat_process):
    kill_builds(tmp_path, chat_process, 10, 600)
