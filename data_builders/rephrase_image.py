"""The stage that has a diffusion model draw a row's picture anew: another picture that shows the same.

stages:
  - stage: rephrase_image
    pipeline: stable-diffusion-v1-5/stable-diffusion-v1-5
    prompt: "{completion}"              # captions; for questions "{scene}", or another column that says what is seen
    kind: v_generality
    where: {kind: reliability, polarity: anti_stereotype}
    keep_rows: true
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from biasunlearn_trainer.data_builders.picture_stage import Asked, PictureStage, column_text, slots_of


@dataclass(eq=False, kw_only=True)
class RephraseImage(PictureStage):
    """An item stage: a row with a new picture, or a reject.

    Args:
        task: text_to_image draws from the prompt alone; image_to_image varies the row's own picture.
        prompt: a template whose slots are columns of the row; of chat messages the last one's text. From text alone
            it needs a slot, or all rows would get one picture.
        strength: of image_to_image, in (0, 1]: how much of the picture is drawn anew; None: the pipeline's default.
        kind: what the column `kind` becomes, for instance v_generality; None: it stays.
        keep_rows: let the row as it was through, too, before its redrawn one.

    All other options are those of `PictureStage`. The new row has `drawn_by`, `drawn_prompt`, `drawn_seed` and, with a
    CLIP model, `drawn_similarity`.
    """

    name: ClassVar[str] = "rephrase_image"

    task: Literal["text_to_image", "image_to_image"] = "text_to_image"
    prompt: str = "{completion}"
    strength: float | None = None
    kind: str | None = None
    keep_rows: bool = False

    def _task(self) -> str:
        return self.task

    def _own_settings(self) -> dict[str, Any]:
        return {"task": self.task, "prompt": self.prompt, "kind": self.kind}

    def _call(self) -> dict[str, Any]:
        return {**super()._call(), **({"strength": self.strength} if self.task == "image_to_image" else {})}

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        yield from strength_faults(self.strength, self.task)
        try:
            self._slots = slots_of(self.prompt, "prompt")
        except ValueError as err:
            yield str(err)
            return
        if not self._slots and self.task == "text_to_image":
            yield f"`prompt` is {self.prompt!r}, without a slot such as {{completion}}: all rows would get one picture"

    def _asked(self, row: dict) -> Asked:
        prompt = self.prompt.format(**{name: column_text(row, name) for name in self._slots})
        return Asked(prompt, prompt, self.task == "image_to_image")

    def _columns(self, row: dict) -> dict[str, Any]:
        return {"kind": self.kind} if self.kind else {}


def strength_faults(strength: float | None, task: str) -> Iterator[str]:
    """What is wrong with `strength`."""
    if strength is None:
        return
    if task != "image_to_image":
        yield f"`strength` belongs to image_to_image, and `task` is {task}"
    if not 0 < strength <= 1 or math.isnan(strength):
        yield f"`strength` must be above 0 and at most 1, got {strength}"
