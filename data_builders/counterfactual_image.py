"""The stage that draws the same scene with another group in it: image-to-image, or by an instruction that edits.

stages:
  - stage: counterfactual_image
    pipeline: timbrooks/instruct-pix2pix
    caption: scene                      # the column that says who is seen; `completion` where captions are the answers

Who takes whose place is said by the word files of the text counterfactuals, so that a row of either group gives one of
the other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from biasunlearn_trainer.data_builders.counterfactual.stage import KEPT, OPPOSITE, POLARITIES
from biasunlearn_trainer.data_builders.counterfactual.swap import Swap, apply, swap_to
from biasunlearn_trainer.data_builders.counterfactual.words import BIAS_TYPES, table, words_version
from biasunlearn_trainer.data_builders.picture_stage import Asked, NotDrawable, PictureStage, column_text, slots_of
from biasunlearn_trainer.data_builders.prompt_templates import text_of, with_text
from biasunlearn_trainer.data_builders.rephrase_image import strength_faults
from biasunlearn_trainer.data_builders.store import digest

SLOTS = ("caption", "original", "before", "after", "group")
DEFAULT_PROMPT = {"instruct": "make it {caption}", "image_to_image": "{caption}"}


@dataclass(eq=False, kw_only=True)
class CounterfactualImages(PictureStage):
    """An item stage: for each row its own picture's row and one with the other group, or a reject.

    Both rows have the columns that the text counterfactuals set: `pair_id`, `bias_type`, `polarity` (the
    counterfactual of a stereotype is an anti-stereotype and the reverse), `source`, `source_id`, `demographic` and
    `counterfactual` (false, true). Words of prompt, completion and caption that name the group are exchanged in the
    second row, which also has `drawn_by`, `drawn_prompt`, `drawn_seed` and, with a CLIP model, `drawn_similarity`.

    Args:
        caption: the column that says who is seen.
        bias_type: of rows that have none, or `other`.
        to: the only group to draw, for captions that name one group; None: where there are several, one is drawn by
            row and seed.
        task: instruct takes an editing pipeline (InstructPix2Pix), image_to_image any other.
        prompt: the instruction or prompt, with {caption} (with the other group in it), {original} (the caption as it
            was), {before} and {after} (the first word that was exchanged, as it was and now) or {group} (the other
            group). Default "make it {caption}" for instruct, "{caption}" for image_to_image.
        strength: of image_to_image, in (0, 1]; None: the pipeline's default.
        image_guidance_scale: of instruct, how closely the picture is kept, 0 or more; None: the pipeline's default.
        polarity: of rows that have none.

    All other options are those of `PictureStage`.
    """

    name: ClassVar[str] = "counterfactual_image"

    caption: str = "completion"
    bias_type: str | None = None
    to: str | None = None
    task: Literal["instruct", "image_to_image"] = "instruct"
    prompt: str | None = None
    strength: float | None = None
    image_guidance_scale: float | None = None
    polarity: str = "neutral"

    def _task(self) -> str:
        return self.task

    def _own_settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("caption", "bias_type", "to", "task", "polarity")}
        return {**own, "prompt": self._template(), "words": words_version()}

    def _template(self) -> str:
        return self.prompt or DEFAULT_PROMPT[self.task]

    def _call(self) -> dict[str, Any]:
        if self.task == "instruct":
            return {**super()._call(), "image_guidance_scale": self.image_guidance_scale}
        return {**super()._call(), "strength": self.strength}

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        yield from strength_faults(self.strength, self.task)
        if self.image_guidance_scale is not None and not (self.task == "instruct" and self.image_guidance_scale >= 0):
            yield f"`image_guidance_scale` belongs to instruct and must be 0 or more, got {self.image_guidance_scale}"
        if self.polarity not in POLARITIES:
            yield f"unknown polarity {self.polarity!r}; valid: {', '.join(POLARITIES)}"
        if self.bias_type is not None and self.bias_type not in BIAS_TYPES:
            yield f"unknown bias type {self.bias_type!r}; there are words for {', '.join(BIAS_TYPES)}"
        elif self.to is not None and (self.bias_type is None or self.to not in table(self.bias_type).groups):
            groups = f"; its groups: {', '.join(table(self.bias_type).groups)}" if self.bias_type else ""
            yield f"`to` is {self.to!r}, expected a group of `bias_type`, which has to be set{groups}"
        yield from self._prompt_faults()

    def _prompt_faults(self) -> Iterator[str]:
        try:
            slots = slots_of(self._template(), "prompt")
        except ValueError as err:
            yield str(err)
            return
        if not set(slots) <= set(SLOTS) or not {"caption", "after", "group"} & set(slots):
            expected = "at least one of {caption}, {after} and {group}, and beside them {original} and {before}"
            yield f"`prompt` is {self.prompt!r}; expected {expected}"

    def _columns_key(self, row: dict) -> list[Any]:
        # The texts change with the picture, and are stored with it.
        labels = [row.get(name) for name in ("bias_type", "polarity", "prompt", "completion", self.caption)]
        return [*super()._columns_key(row), *labels]

    def _asked(self, row: dict) -> Asked:
        swapped, _ = self._swapped(row)
        return Asked(self._prompt(row, swapped), swapped["caption"], True)

    def _prompt(self, row: dict, swapped: Mapping[str, str]) -> str:
        return self._template().format(**{slot: swapped[slot] for slot in SLOTS})

    def _swapped(self, row: dict) -> tuple[dict[str, str], dict[str, Any]]:
        """What the prompt's slots stand for, and the columns of the row with the other group. Raises NotDrawable."""
        given = row.get("bias_type")
        bias_type = self.bias_type if given in (None, "", "other") else given
        if bias_type not in BIAS_TYPES or self.bias_type not in (None, bias_type):
            raise NotDrawable("other_bias_type" if bias_type else "no_bias_type", str(given))
        columns = [self.caption, *(name for name in ("prompt", "completion") if name != self.caption)]
        column_text(row, self.caption)
        texts = [text_of(row[name]) if row.get(name) else "" for name in columns]
        found = swap_to("\n".join(texts), bias_type, lambda first: self._order(row, bias_type))
        if found.text is None:
            raise NotDrawable(found.reason, f"{bias_type}: {found.detail}")
        changed = _split(found, texts)
        if changed is None or changed[0] == texts[0]:
            raise NotDrawable("no_term", f"{bias_type}: the caption names no group: {texts[0].strip()}")
        # Edits begin with the article where "a man" becomes "an actress".
        start, end, after = next(edit for edit in found.edits if texts[0][edit[0] : edit[1]].lower() not in ("a", "an"))
        one_line = {"caption": changed[0], "original": texts[0], "before": texts[0][start:end], "after": after}
        # "make it a man ...": there the caption is a part of the instruction.
        shown = _within if self.task == "instruct" else lambda text: " ".join(text.split())
        slots = {name: shown(text) for name, text in one_line.items()}
        made = {name: with_text(row[name], text) for name, text in zip(columns, changed, strict=True) if row.get(name)}
        first, other = found.groups
        return {**slots, "group": other}, {**made, "bias_type": bias_type, "demographic": [first, other]}

    def _order(self, row: dict, bias_type: str) -> tuple[str, ...]:
        if self.to is not None:
            return (self.to,)
        place = [self.seed, row.get("source"), row.get("source_id"), row.get("pair_id")]
        return tuple(sorted(table(bias_type).groups, key=lambda group: digest([place, group])))

    def rows_from(self, row: dict, made: Mapping[str, Any]) -> Iterator[dict]:
        """The row as it is, labelled, then the one with the other group."""
        _, columns = self._swapped(row)
        (first, other), polarity = columns.pop("demographic"), row.get("polarity") or self.polarity
        key = self.key(row)
        ids = {
            "bias_type": columns["bias_type"],
            "pair_id": f"counterfactual-{key[:16]}",
            "source": row.get("source") or "pictures",
            "source_id": row.get("source_id") or key[:16],
        }
        yield {**row, **ids, "polarity": polarity, "demographic": first, "counterfactual": False}
        kept = {name: row[name] for name in (*KEPT, "part_group") if name in row}
        labels = {"polarity": OPPOSITE.get(polarity, polarity), "demographic": other, "counterfactual": True}
        yield {**kept, **columns, **ids, **labels, **made["columns"], "images": [self._picture(made)]}


def _within(text: str) -> str:
    """A caption as a part of a sentence.

    >>> _within("A man on a bus.")
    'a man on a bus'
    """
    return re.sub(r"^(A|An|The)\b", lambda found: found[0].lower(), " ".join(text.split()).rstrip("."))


def _split(swapped: Swap, texts: list[str]) -> list[str] | None:
    """The swapped texts; None where a word lies across two of them."""
    changed, start = [], 0
    for text in texts:
        end = start + len(text)
        inside = [(a - start, b - start, new) for a, b, new in swapped.edits if start <= a and b <= end]
        changed.append(apply(text, inside))
        start = end + 1
    return changed if "\n".join(changed) == swapped.text else None
