"""PATA, Protected Attribute Tag Association (Seth, Hemani and Agarwal, CVPR 2023): people in 24 scenes, with captions.

Read are the two files of the authors' repository as published:

    pata_fairness.files.lst      SCENE_RACE_GENDER_AGE|ADDRESS, a line a picture (4,934)
    pata_fairness.captions.json  of each scene `short` (its name), `long` (a sentence about the picture with slots), and
                                 `pos` and `neg`: lists of captions under `races`, `gender` and `age`

`neg` holds captions that insult or belittle in view of the attribute, `pos` others that fit the scene: which of them
a model finds likelier must not hang on the person. A scene without both for an attribute has none to compare (16 of
the 24 for age; drinking_water for gender).

The repository states no licence, and the pictures, found by an image search, belong to whoever made them: they come
from addresses, and sets with them cannot be passed on. Race, gender and age are the publishers' words for a picture.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.numbered_pictures import FOLDER, find_numbered

PICTURES_FILE, CAPTIONS_FILE = "pata_fairness.files.lst", "pata_fairness.captions.json"
# Their name of an attribute, and the schema's bias type.
ATTRIBUTES = {"race": "races", "gender": "gender", "age": "age"}
LABELS = (("black", "caucasian", "eastasian", "hispanic", "indian"), ("female", "male"), ("old", "young"))
LICENCE = "none stated by its authors, and no redistribution of the pictures, which others own"
PROMPT = "Caption for the picture:"

Captions = Mapping[str, Mapping[str, tuple[Sequence[str], Sequence[str]]]]
"""Of each scene and bias type, the insulting captions and the others."""


@dataclass(frozen=True)
class PataPicture:
    """One picture: `number` is its line in the list, from 0, by which its file is named."""

    number: int
    scene: str
    race: str
    gender: str
    age: str
    picture: Path


def read_pata(folder: str | Path, pictures: str | Path | None = None) -> tuple[list[PataPicture], Captions, dict]:
    """Reads PATA.

    Args:
        folder: the authors' repository.
        pictures: the folder of the pictures (`numbered_pictures`); by default `images` in the repository.

    Returns:
        The pictures that open; the captions that can be compared; of each scene the sentence `long`.

    Raises:
        FileNotFoundError: one of the two files is not there.
        InvalidDataset: all faults of both, or that there are no pictures.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in (PICTURES_FILE, CAPTIONS_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; expected the repository of PATA.")
    faults = Faults(str(folder / CAPTIONS_FILE))
    captions, sentences = _read_captions(folder / CAPTIONS_FILE, faults)
    faults.raise_if_any()
    faults = Faults(str(folder / PICTURES_FILE))
    lines = (folder / PICTURES_FILE).read_text("utf-8").splitlines()
    labels = [_labels(line, f"line {number}", captions, faults) for number, line in enumerate(lines, start=1)]
    faults.raise_if_any()
    found = find_numbered(pictures or folder / FOLDER, range(len(lines)), faults)
    faults.raise_if_any()
    return [PataPicture(n, *labels[n], found[n]) for n in range(len(lines)) if n in found], captions, sentences


def _read_captions(file: Path, faults: Faults) -> tuple[dict, dict]:
    try:
        scenes = json.loads(file.read_text("utf-8"))
    except ValueError as err:
        faults.add(f"this is no JSON: {err}")
        return {}, {}
    captions, sentences = {}, {}
    for number, scene in enumerate(scenes if isinstance(scenes, list) else [], start=1):
        try:
            both = {bias: (scene["neg"][name], scene["pos"][name]) for bias, name in ATTRIBUTES.items()}
            captions[scene["short"]] = {bias: two for bias, two in both.items() if all(two)}
            sentences[scene["short"]] = scene["long"]
        except (KeyError, TypeError) as err:
            faults.add(
                f"expected long, short, pos and neg, each of these with races, gender and age: {err!r}"
                f" in {scene!r:.80}",
                f"scene {number}",
            )
    if not captions and not faults.count:
        faults.add("it has no scenes")
    return captions, sentences


def _labels(line: str, where: str, captions: Captions, faults: Faults) -> tuple[str, ...]:
    name, bar, address = line.partition("|")
    parts = name.rsplit("_", 3)
    if not bar or not address or len(parts) != 4:
        faults.add(f"expected SCENE_RACE_GENDER_AGE|ADDRESS, got {line!r:.80}", where)
        return ()
    if parts[0] not in captions:
        meant = nearest(parts[0], captions)
        faults.add(
            f"there are no captions for the scene {parts[0]!r}" + (f"; nearest: {meant}" if meant else ""), where
        )
    for value, valid in zip(parts[1:], LABELS, strict=True):
        if value not in valid:
            faults.add(f"unknown label {value!r}; expected one of {', '.join(valid)}", where)
    return tuple(parts)


def draw_bias_types(
    pictures: Sequence[PataPicture], captions: Captions, seed: int = 0, counts: Mapping[str, int] | None = None
) -> dict[int, str]:
    """Draws the bias type that each picture stands for, as the debiasing benchmark does (section 3.3.1 of its paper).

    Args:
        pictures: from `read_pata`.
        captions: the same.
        seed: of the draw.
        counts: how many pictures of each bias type. None draws a type for every picture, each that its scene has
            captions for being equally likely.

    Returns:
        By number of a picture, its bias type. With `counts`, pictures beyond them have none; where a type has too few
        pictures it gets all that there are.

    Raises:
        ValueError: a count of an unknown bias type, or below 0.
    """
    if counts is None:
        options = {p.number: sorted(captions[p.scene]) for p in pictures}
        return {n: random.Random(f"{seed}/pata/{n}").choice(types) for n, types in options.items() if types}
    wrong = {name: count for name, count in counts.items() if name not in ATTRIBUTES or count < 0}
    if wrong:
        raise ValueError(f"`counts` must be 0 or more of {', '.join(ATTRIBUTES)}, got {wrong}.")
    fitting = {bias: [p.number for p in pictures if bias in captions[p.scene]] for bias in counts}
    drawn: dict[int, str] = {}
    # The type with the fewest scenes first: its scenes have captions for the other types, too.
    for bias in sorted(counts, key=lambda name: (len(fitting[name]), counts[name])):
        left = [number for number in fitting[bias] if number not in drawn]
        random.Random(f"{seed}/pata/{bias}").shuffle(left)
        drawn.update(dict.fromkeys(left[: counts[bias]], bias))
    return drawn


def pata_rows(
    path: str, *, pictures: str | None = None, seed: int = 0, counts: dict[str, int] | None = None
) -> list[dict]:
    """Two captioning rows a picture, of one bias type drawn for it and one caption of either kind.

    The insulting caption is the stereotype, the other one the anti-stereotype, with the first as `rejected`.
    """
    read, captions, sentences = read_pata(path, pictures)
    drawn = draw_bias_types(read, captions, seed, counts)
    rows = []
    for picture in read:
        if picture.number not in drawn:
            continue
        bias_type = drawn[picture.number]
        choice = random.Random(f"{seed}/pata captions/{picture.number}").choice
        insulting, other = (choice(several).strip() for several in captions[picture.scene][bias_type])
        row = {
            "prompt": PROMPT,
            "images": [str(picture.picture)],
            "bias_type": bias_type,
            "pair_id": f"pata-{picture.number}",
            "source": "pata",
            "source_id": str(picture.number),
            "kind": "ambiguous",
            "scene": picture.scene,
            "scene_prompt": scene_prompt(sentences[picture.scene], picture),
        }
        rows.append({**row, "completion": f" {insulting}", "polarity": "stereotype", "rejected": None})
        rows.append({**row, "completion": f" {other}", "polarity": "anti_stereotype", "rejected": f" {insulting}"})
    return rows


def scene_prompt(sentence: str, picture: PataPicture) -> str:
    """The publishers' sentence about a picture with its slots filled; some have two pairs of braces.

    >>> scene_prompt("photo of a {race} {{gender}} pilot", PataPicture(0, "pilot", "black", "female", "old", Path()))
    'photo of a black female pilot'
    """
    return re.sub(r"\{+(race|gender|age)\}+", lambda slot: getattr(picture, slot[1]), sentence)
