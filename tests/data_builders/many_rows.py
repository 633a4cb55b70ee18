"""Writes as many rows as asked for that counterfactuals accept: a large set to measure a build with.

    python tests/data_builders/many_rows.py 100000 FOLDER_WITH_THE_DATA OUT     # OUT/rows.jsonl and OUT/recipe.yaml
    /usr/bin/time -v python -m biasunlearn_trainer.data_builders.build OUT/recipe.yaml

The rows are those of StereoSet, CrowS-Pairs and BBQ that are accepted, one after the other and again, each behind a
sentence of its own. A text that is repeated behind another sentence is nearly the same as before, so the comparison of
parts has much to compare.
"""

import json
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import yaml

from biasunlearn_trainer.data_builders.catalogue import SOURCES
from biasunlearn_trainer.data_builders.counterfactual import Counterfactuals

WEATHER = ("rain", "snow", "fog", "wind", "dew", "hail", "sleet")
PLACES = ("roof", "bridge", "harbour", "garden", "orchard", "market", "hillside", "railway", "meadow", "quay", "barn")
COLUMNS = ("bias_type", "polarity", "source", "source_id")


def accepted_rows(data: Path) -> list[dict]:
    """The rows of the three sets that can be swapped, each text once."""
    read = (row for name in ("stereoset", "crows_pairs", "bbq") for row in SOURCES[name].read(str(data / name)))
    made = Counterfactuals().run(read)
    rows = [row for row in made if isinstance(row, dict) and not row["counterfactual"]]
    texts = {(row["bias_type"], row["prompt"], row["completion"]): row for row in rows}
    return list(texts.values())


def many_rows(num_rows: int, data: Path) -> Iterator[dict]:
    """Yields the rows again and again, behind sentences of which none is the same twice."""
    for number, row in enumerate(islice(cycle(accepted_rows(data)), num_rows)):
        weather, place = WEATHER[number % len(WEATHER)], PLACES[number % len(PLACES)]
        prompt = f"On day {number} there was {weather} over the {place}. {row['prompt']}"
        yield {"prompt": prompt, "completion": row["completion"], **{name: row[name] for name in COLUMNS}}


def write(num_rows: int, data: Path, folder: Path) -> Path:
    """Writes the rows and a recipe that builds them; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in many_rows(num_rows, data))
    recipe = {
        "name": "many_rows",
        "sources": [{"source": "rows", "path": str(folder / "rows.jsonl"), "licence": "CC BY-SA 4.0"}],
        "stages": [{"stage": "counterfactual"}],
        "parts": {"train": 0.7, "report": 0.3},
        "splits": {
            "forget": {"part": "train", "where": {"polarity": "stereotype"}},
            "retain": {"part": "train", "where": {"polarity": ["anti_stereotype", "neutral", "unrelated"]}},
            "report": {"part": "report"},
        },
        "output_dir": str(folder / "set"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


if __name__ == "__main__":
    write(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
