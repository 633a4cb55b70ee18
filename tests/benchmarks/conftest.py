"""A few rows of our own in exactly the published schemas, as clones of the Hub repositories would hold them."""

import io
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture

PEOPLE = ("001", "002", "003", "004")
HOBBIES = ("chess", "rowing", "baking", "pottery")


def picture(shade: int) -> dict:
    buffer = io.BytesIO()
    Picture.new("RGB", (32, 32), (shade % 256, 40, 90)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


TEXT = Value("string")
OPTIONS = dict.fromkeys("ABCD", TEXT)
CHOICES = List({"Correct_Answer": TEXT, "Options": OPTIONS, "Question": TEXT})
WRITTEN = List({"Ground_Truth": TEXT, "Question": TEXT, "Type": TEXT})
MLLMU_FEATURES = {
    "image": Image(),
    "ID": TEXT,
    "biography": TEXT,
    "question": TEXT,
    "answer": TEXT,
    "Classification_Task": {"Image_Textual_Questions": CHOICES, "Pure_Text_Questions": CHOICES},
    "Generation_Task": WRITTEN,
    "Mask_Task": WRITTEN,
}


def mllmu_row(person: str) -> dict:
    number = PEOPLE.index(person)
    options = dict(zip("ABCD", HOBBIES, strict=True))
    right = "ABCD"[number]
    asked = {"Correct_Answer": right, "Options": options}
    hobby = HOBBIES[number]
    return {
        "image": picture(50 * number),
        "ID": person,
        "biography": "{}",
        "question": "Tell me about this person.",
        "answer": f"Person {person}.",
        "Classification_Task": {
            "Image_Textual_Questions": [{**asked, "Question": "What is this person's hobby?"}],
            "Pure_Text_Questions": [{**asked, "Question": f"What is the hobby of Person {person}?"}],
        },
        "Generation_Task": [
            {"Type": "Image_Textual", "Question": "What does this person like?", "Ground_Truth": f"They like {hobby}."},
            {"Type": "Pure_Text", "Question": f"What does {person} like?", "Ground_Truth": f"They like {hobby}."},
        ],
        "Mask_Task": [
            {"Type": "Image_Textual", "Question": "This person likes __.", "Ground_Truth": hobby},
            {"Type": "Pure_Text", "Question": f"Person {person} likes __.", "Ground_Truth": hobby},
        ],
    }


def save(rows: list[dict], features: dict, folder, name: str = "train-00000-of-00001.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(folder / name)
    return folder


@pytest.fixture
def mllmu_rows():
    """`mllmu_rows(root, config, rows)` writes rows of our own as a configuration."""
    return lambda root, config, rows: save(rows, MLLMU_FEATURES, root / config)


@pytest.fixture
def mllmu_row_of():
    """`mllmu_row_of(person)`: one row in the published schema."""
    return mllmu_row


@pytest.fixture
def mllmu(tmp_path):
    """MLLMU-Bench: one person to forget, two to keep, one celebrity."""
    root = tmp_path / "MLLMU-Bench"
    for config, people in (("forget_5", ["001"]), ("retain_95", ["002", "003"]), ("Retain_Set", ["004"])):
        save([mllmu_row(person) for person in people], MLLMU_FEATURES, root / config)
    everybody = [mllmu_row(person) for person in PEOPLE[:3]]
    features = {"images": List(Image()), **{k: v for k, v in MLLMU_FEATURES.items() if k != "image"}}
    drawn = [{**row, "images": [picture(200), picture(201)]} for row in everybody]
    for row in drawn:
        del row["image"]
    save(drawn[:2], features, root / "Test_Set", "train-00000-of-00002.parquet")
    save(drawn[2:], features, root / "Test_Set", "train-00001-of-00002.parquet")
    fine_tuning = [
        {
            "image": row["image"],
            "ID": row["ID"],
            "metadata": json.dumps([{"Question": "What is the hobby?", "Answer": HOBBIES[i]}] * 2),
        }
        for i, row in enumerate(everybody)
    ]
    save(fine_tuning, {"image": Image(), "ID": TEXT, "metadata": TEXT}, root / "ft_Data")
    return root


CAPTIONS = {"image": Image(), "caption": TEXT, "name": TEXT}
PERTURBED = CAPTIONS | {"perturbed_captions": List(TEXT), "paraphrased_caption": TEXT, "perturbed_names": List(TEXT)}
MIXED = {"image": Image(), "caption": TEXT, "question": TEXT, "answer": TEXT}


@pytest.fixture
def clear(tmp_path):
    """CLEAR: Ana Ilves to forget, Bo Renn to keep."""
    root = tmp_path / "CLEAR"
    for config, name, shade in (("forget05", "Ana Ilves", 10), ("retain95", "Bo Renn", 120)):
        rows = [{"image": picture(shade + i), "caption": f"{name} reads book {i}.", "name": name} for i in range(2)]
        save(rows, CAPTIONS, root / config)
        texts = [{"image": None, "caption": None, "question": f"Where was {name} born?", "answer": "In Tartu."}]
        mixed = [{"image": row["image"], "caption": row["caption"], "question": None, "answer": None} for row in rows]
        save([*mixed, *texts], MIXED, root / f"{config}+tofu")
        save(
            [
                {
                    **row,
                    "perturbed_captions": [f"{name} swims.", f"{name} sings."],
                    "paraphrased_caption": f"{name} is reading.",
                    "perturbed_names": ["Cai Dunn", "Eli Frost", "Gus Hart"],
                }
                for row in rows
            ],
            PERTURBED,
            root / f"{'forget05' if config == 'forget05' else 'retain'}_perturbed",
        )
    faces = {"image": picture(60), "answer": "A Star", "options": ["Another Star", "Third Star"]}
    save([faces], {"image": Image(), "answer": TEXT, "options": List(TEXT)}, root / "real_faces")
    world = {"image": picture(70), "question": "What is this?", "answer": "A bridge", "options": ["A hat", "A cat"]}
    features = {"image": Image(), "question": TEXT, "answer": TEXT, "options": List(TEXT)}
    save([world], features, root / "real_world", "test-00000-of-00001.parquet")
    return root


@pytest.fixture
def tofu(tmp_path):
    """TOFU: the four sets of an evaluation, JSON Lines named .json, and the plain forget and retain split."""
    root = tmp_path / "TOFU"
    root.mkdir()
    rows = {
        "forget10": [{"question": "Who wrote A?", "answer": "Ana Ilves wrote A."}],
        "retain90": [{"question": "Who wrote B?", "answer": "Bo Renn wrote B."}],
    }
    for name, plain in (("forget10_perturbed", "forget10"), ("retain_perturbed", "retain90")):
        rows[name] = [
            {**row, "paraphrased_answer": f"It was {row['answer']}", "perturbed_answer": ["Cai.", "Eli.", "Gus."]}
            for row in rows[plain] * 3
        ]
    for name in ("real_authors_perturbed", "world_facts_perturbed"):
        rows[name] = [
            {"question": "Where is it?", "answer": "Here", "perturbed_answer": ["There", "Nowhere", "Up"]}
        ] * 3
    for name, lines in rows.items():
        (root / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return root


SB_FEATURES = {
    "file_name": Image(),
    "id": TEXT,
    "category": ClassLabel(names=["Age", "Disability_status", "Race_etnicity", "Religion"]),
    "additional_metadata": TEXT,
    "question_polarity": ClassLabel(names=["neg", "nonneg"]),
    "context": TEXT,
    "question": TEXT,
    "ans0": TEXT,
    "ans1": TEXT,
    "ans2": TEXT,
    "label": ClassLabel(names=["0", "1", "2"]),
}


def sb_row(identity, category, polarity, groups, options, label=2, question="Who was late?") -> dict:
    metadata = {"subcategory": "None", "stereotyped_groups": groups, "version": "a", "source": "none"}
    return {
        "file_name": picture(len(identity) + 17 * len(options[0])),
        "id": identity,
        "category": category,
        "additional_metadata": str(metadata),
        "question_polarity": polarity,
        "context": "The people in the image met.",
        "question": question,
        **{f"ans{i}": text for i, text in enumerate(options)},
        "label": str(label),
    }


@pytest.fixture
def sb_rows():
    """Five items: four whose target is told in different ways, and one whose target is not."""
    return [
        sb_row(
            "01_01_0001_1_01", "Age", "neg", ["old"], ["The 62 year old", "The 24-year-old", "Cannot be determined"]
        ),
        sb_row("01_02_0002_2_01", "Age", "nonneg", ["old"], ["Not known", "The young man", "The old man"], 0),
        sb_row("07_01_0003_1_01", "Religion", "neg", ["Muslim"], ["The Muslim man", "The Hindu man", "Unknown"]),
        sb_row("06_01_0004_1_01", "Race_etnicity", "nonneg", ["Black"], ["Ann", "Ben", "Not enough info"]),
        sb_row("06_02_0005_1_01", "Race_etnicity", "neg", ["Black"], ["The Black woman", "Cannot answer", "Eve"], 1),
    ]


@pytest.fixture
def save_sb():
    """`save_sb(rows, root, split)` writes a split as the Hub repository does."""
    return lambda rows, root, split="real": save(rows, SB_FEATURES, root / "data", f"{split}-00000-of-00001.parquet")
