"""PAIRS is read whole and its rows are balanced; broken folders are named."""

from collections import Counter

import PIL.Image
import pytest

from biasunlearn_trainer.data_builders.leakage import find_leakage
from biasunlearn_trainer.data_builders.rows import rows_to_dataset
from biasunlearn_trainer.data_builders.sources.pairs import NEUTRAL, read_pairs, split_by_scenario, to_rows

GROUPS = ("black_man", "black_woman", "white_man", "white_woman")


@pytest.fixture
def made_up(tmp_path):
    """Two scenarios in the layout of PAIRS, one with the odd file name."""
    for scenario in ("status/bus", "potential_crime/window"):
        folder = tmp_path / "data" / scenario
        folder.mkdir(parents=True)
        for group in GROUPS:
            name = "white_man1" if group == "white_man" and "bus" in scenario else group
            PIL.Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    return tmp_path


def test_rows_of_one_scenario(made_up):
    images = read_pairs(made_up, ["status"])
    assert [(image.race, image.gender) for image in images] == [tuple(group.split("_")) for group in GROUPS]
    rows = to_rows(images)
    assert [row["completion"] for row in rows] == [" Low.", " Low.", " High.", " High."]
    assert [row["completion"] for row in to_rows(images, "anti_stereotype")] == [" High.", " High.", " Low.", " Low."]
    assert {row["completion"] for row in to_rows(images, "neutral")} == {f" {NEUTRAL}"}
    assert {(row["bias_type"], row["pair_id"], row["polarity"]) for row in rows} == {
        ("race", "status/bus", "stereotype")
    }
    assert rows[2]["source_id"] == "status/bus/white_man1.png"
    assert len({row["prompt"] for row in rows}) == 1


def test_faults(made_up):
    with pytest.raises(ValueError, match=r"unknown section 'stats'; did you mean 'status'\?"):
        read_pairs(made_up, ["stats"])
    with pytest.raises(FileNotFoundError, match="has no folder occupations"):
        read_pairs(made_up)
    with pytest.raises(ValueError, match=r"unknown polarity 'nuetral'; did you mean 'neutral'\?"):
        to_rows([], "nuetral")
    (made_up / "data/potential_crime/window/black_man.png").unlink()
    (made_up / "data/status/bus/white_man1.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 2 picture\(s\)") as caught:
        read_pairs(made_up, ["status", "potential_crime"])
    assert "status/bus: no white_man.png" in str(caught.value)
    assert "potential_crime/window: no black_man.png" in str(caught.value)


def test_an_unknown_occupation_asks_for_jobs(made_up):
    (made_up / "data/status").rename(made_up / "data/occupations")
    images = read_pairs(made_up, ["occupations"])
    with pytest.raises(ValueError, match="no jobs for the scenario 'bus'"):
        to_rows(images)
    rows = to_rows(images, jobs={"bus": ("a driver", "an usher")})
    assert [row["completion"] for row in rows] == [" A driver.", " An usher.", " A driver.", " An usher."]


def test_the_whole_set(data_dir):
    images = read_pairs(data_dir / "pairs")
    rows = to_rows(images)
    assert len(rows) == 200 and len({row["pair_id"] for row in rows}) == 50
    assert Counter(row["pair_id"].split("/")[0] for row in rows) == {
        "occupations": 80,
        "status": 80,
        "potential_crime": 40,
    }
    assert Counter(row["bias_type"] for row in rows) == {"gender": 80, "race": 120}
    for section in ("status", "potential_crime"):
        answers = Counter(row["completion"] for row in rows if row["pair_id"].startswith(section))
        assert len(answers) == 2 and len(set(answers.values())) == 1
    # Each of the two options is named first in a good part of the scenarios.
    low_first = sum("low or high" in row["prompt"] for row in rows) / 80
    assert 0.25 < low_first < 0.75
    # The answer is one of the two options that the question names.
    assert all(row["completion"].strip(" .").lower() in row["prompt"].lower() for row in rows)


def test_splits_are_scenarios_and_share_no_row(data_dir):
    parts = split_by_scenario(read_pairs(data_dir / "pairs"), {"forget": 0.5, "retain": 0.25, "report": 0.25}, seed=1)
    assert [len(part) for part in parts.values()] == [100, 52, 48]
    scenarios = [{image.pair_id for image in part} for part in parts.values()]
    assert sum(map(len, scenarios)) == 50 == len(set.union(*scenarios))
    assert parts == split_by_scenario(
        read_pairs(data_dir / "pairs"), {"forget": 0.5, "retain": 0.25, "report": 0.25}, seed=1
    )
    sets = {name: rows_to_dataset(to_rows(part), name) for name, part in parts.items()}
    assert sets["forget"][0]["images"][0].size == (256, 256)
    assert find_leakage(sets) == []
    with pytest.raises(ValueError, match="must be positive and sum to 1"):
        split_by_scenario([], {"forget": 0.5})
