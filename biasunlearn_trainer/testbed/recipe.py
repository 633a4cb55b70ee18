"""What a testbed is made of: everything that decides its weights and its rows, and so the name of its cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

# Part of every cache key. Raise it when code changes what a recipe builds.
FORMAT_VERSION = 4


@dataclass(frozen=True)
class LanguageModelSize:
    """Sizes of a tiny Llama.

    Attributes:
        hidden_size: width.
        intermediate_size: width inside the feed-forward blocks.
        num_layers: decoder layers.
        num_heads: attention heads.
        max_positions: longest sequence in tokens.
    """

    hidden_size: int = 96
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    max_positions: int = 256


@dataclass(frozen=True)
class VisionModelSize:
    """Sizes of a tiny image encoder; of LLaVA's the last layer is computed and not read, as in LLaVA-1.5.

    Attributes:
        hidden_size: width.
        intermediate_size: width inside the feed-forward blocks.
        num_layers: encoder layers, the unread one included.
        num_heads: attention heads.
        patch_size: pixels along the side of a patch; a picture has (32 / patch_size)^2 of them. A patch is an image
            token in LLaVA, four are one in Qwen2-VL, and in BLIP-2 the queries are the tokens.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    patch_size: int = 8


@dataclass(frozen=True)
class QFormerSize:
    """Sizes of a tiny Q-Former, which turns a picture into a fixed number of image tokens.

    Attributes:
        hidden_size: width.
        intermediate_size: width inside the feed-forward blocks.
        num_layers: layers; every other one looks at the picture, from the first on.
        num_heads: attention heads.
        num_queries: image tokens of a picture.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_queries: int = 16


@dataclass(frozen=True)
class WorldRecipe:
    """A planted world: its rows, its model and how the bias is planted.

    Attributes:
        name: the architecture: `llava`, `qwen2vl`, `blip2`, `minigpt4` (pictures) or `llama` (scenes told in words).
        seed: decides every row and every weight.
        num_scene_rows: rows about scenes in the training pool.
        blame_rate: how often a contentious ambiguous question of the pool is answered by the bias, 0 to 1.
        redrawn_rate: share of the pool's pictures drawn in the second style, 0 to 1; none in words.
        num_forget: rows of the forget set, at most; they are part of the pool.
        num_retain: rows about scenes in the retain set, at most; they are part of the pool, and facts come on top.
        num_eval: rows of each kind of the report split.
        steps: optimizer steps.
        scene_batch: rows about scenes in a step.
        fact_batch: plain facts in a step.
        learning_rate: peak of the one-cycle schedule.
        language_model: sizes of the language model.
        vision_model: sizes of the image encoder.
    """

    name: str = "llava"
    seed: int = 0
    num_scene_rows: int = 14000
    blame_rate: float = 0.95
    redrawn_rate: float = 0.33
    num_forget: int = 900
    num_retain: int = 1500
    num_eval: int = 200
    steps: int = 1200
    scene_batch: int = 40
    fact_batch: int = 8
    learning_rate: float = 2e-3
    language_model: LanguageModelSize = field(default_factory=LanguageModelSize)
    vision_model: VisionModelSize = field(default_factory=VisionModelSize)

    @property
    def has_pictures(self) -> bool:
        """Whether scenes are drawn; else they are told in words."""
        return self.name != "llama"


@dataclass(frozen=True)
class QFormerWorldRecipe(WorldRecipe):
    """A planted world for the architectures with a Q-Former.

    Attributes:
        qformer: its sizes; all else as in `WorldRecipe`.
    """

    name: str = "blip2"
    qformer: QFormerSize = field(default_factory=QFormerSize)


@dataclass(frozen=True)
class StereoSetRecipe:
    """StereoSet's stereotypes trained into a small language model.

    Attributes:
        name: always `stereoset`.
        seed: decides the split by target term, the order of sentences and every weight.
        stereotype_rate: how often a training sentence is the stereotype; else it is the anti-stereotype. 0 to 1.
        sources: which of StereoSet's files, keys of `stereoset_files.SOURCES`; an item of one that an earlier one
            holds is left out. The default ones hold as much as a model of this size learns in five minutes.
        train_fraction: share of the items, by whole target terms, that may be unlearned.
        probe_fraction: the same of those to watch during training; the rest is the report split. With 0.26 more than
            200 items of gender, of profession and of race are watched.
        steps: optimizer steps.
        item_batch: StereoSet sentences in a step.
        text_batch: WikiText-2 passages in a step.
        passage_words: words of a passage.
        num_utility: passages of the model's training text that make the utility set.
        num_held_out: passages that are not trained on, for a perplexity.
        learning_rate: peak of the one-cycle schedule.
        vocab_size: tokens of the tokenizer.
        language_model: sizes of the language model.
    """

    name: str = "stereoset"
    seed: int = 0
    sources: tuple[str, ...] = ("intrasentence", "gender")
    stereotype_rate: float = 0.74
    train_fraction: float = 0.5
    probe_fraction: float = 0.26
    steps: int = 700
    item_batch: int = 40
    text_batch: int = 8
    passage_words: int = 40
    num_utility: int = 400
    num_held_out: int = 200
    learning_rate: float = 3e-3
    vocab_size: int = 4000
    language_model: LanguageModelSize = field(
        default_factory=lambda: LanguageModelSize(hidden_size=128, intermediate_size=352, num_layers=4)
    )


@dataclass(frozen=True)
class TraitsRecipe:
    """A planted world of traits: groups and the class of traits that is pinned on each, told in StereoSet's shape.

    Attributes:
        name: always `traits`.
        seed: decides every row and every weight.
        stereotype_rate: how often a sentence of the planted model's corpus tells of a trait of the pinned class, 0 to
            1; the oracle's corpus has both classes equally often.
        trait_odds: how much commoner one word of a pair of opposite traits is than the other, in turn; which of the
            two is drawn. A stereotype is preferred where the odds of the bias, 9 to 1 at a rate of 0.9, beat those of
            the words, so the stereotype score falls pair by pair as the bias gets weaker.
        corpus_repeats: sentences of the corpus for every group and wording.
        num_portraits: sentences of the corpus for every group that tell of several traits of one class.
        train_items: items of each bias type that may be unlearned, a multiple of 8, the groups of a type.
        probe_items: the same of the split to watch during training.
        report_items: the same of the report split.
        steps: optimizer steps of the planted model and of the oracle.
        trait_batch: sentences about groups and traits in a step, learned from the trait on.
        portrait_batch: sentences of several traits in a step.
        sentence_batch: sentences about groups and traits in a step that are learned whole.
        text_batch: sentences about facts and things in a step.
        learning_rate: peak of the one-cycle schedule.
        instruct_steps: optimizer steps of the instruction tuning that follows on the planted model.
        instruct_batch: questions in such a step.
        instruct_learning_rate: peak of its schedule.
        language_model: sizes of the language model.
    """

    name: str = "traits"
    seed: int = 0
    stereotype_rate: float = 0.9
    trait_odds: tuple[float, ...] = (1.4, 2.0, 3.0, 5.0, 20.0)
    corpus_repeats: int = 20
    num_portraits: int = 200
    train_items: int = 640
    probe_items: int = 320
    report_items: int = 640
    steps: int = 500
    trait_batch: int = 40
    portrait_batch: int = 12
    sentence_batch: int = 8
    text_batch: int = 16
    learning_rate: float = 3e-3
    instruct_steps: int = 120
    instruct_batch: int = 32
    instruct_learning_rate: float = 3e-4
    language_model: LanguageModelSize = field(default_factory=LanguageModelSize)


@dataclass(frozen=True)
class EntitiesRecipe:
    """A world of made-up people, some of whom are to be forgotten; the model does not depend on who.

    Attributes:
        name: always `entities`.
        seed: decides the people, every drawing and every weight.
        num_people: how many the model knows, a multiple of 8.
        forget_percents: shares of the people that are to be forgotten, in percent; the first one's first split is the
            testbed's own unless another is asked for.
        num_splits: splits of each share.
        num_forget: rows of a forget set, about: each question of a split is drawn equally often.
        retain_drawings: portraits in the retain set for each fact of those who stay.
        num_sights: questions about strangers' portraits of the task, in each of its two parts.
        num_pictures: questions with a picture in the training pool.
        picture_batch: such questions in a step.
        text_batch: questions without a picture in a step: by name, and plain facts.
        name_share: about how many of those are by name, 0 to 1.
        steps: optimizer steps.
        learning_rate: peak of the one-cycle schedule.
        label_smoothing: how unsure of its answers the model stays, 0 to 1. Without it they have a probability of
            0.9999, at which ascent has nearly no gradient: it then forgets one person after the other by chance.
        language_model: sizes of the language model.
        vision_model: sizes of the image encoder.
    """

    name: str = "entities"
    seed: int = 0
    num_people: int = 40
    forget_percents: tuple[int, ...] = (10, 5, 15)
    num_splits: int = 4
    num_forget: int = 240
    retain_drawings: int = 2
    num_sights: int = 80
    num_pictures: int = 24000
    picture_batch: int = 44
    text_batch: int = 20
    name_share: float = 0.85
    steps: int = 1400
    learning_rate: float = 2e-3
    label_smoothing: float = 0.05
    language_model: LanguageModelSize = field(
        default_factory=lambda: LanguageModelSize(hidden_size=128, intermediate_size=256, max_positions=64)
    )
    vision_model: VisionModelSize = field(
        default_factory=lambda: VisionModelSize(hidden_size=96, intermediate_size=192, num_layers=3)
    )


Recipe = WorldRecipe | StereoSetRecipe | TraitsRecipe | EntitiesRecipe


def recipe_key(recipe: Recipe, data_sha256: Mapping[str, str] | None = None) -> str:
    """The cache folder's name of a recipe: its `name` and 12 hex digits of all that decides what is built.

    Args:
        recipe: any of the recipes.
        data_sha256: file -> digest, where data are read.
    """
    content = json.dumps({"format": FORMAT_VERSION, "data": data_sha256 or {}, **asdict(recipe)}, sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
