"""What the stages that draw pictures share: options, seeds, checks of what was drawn, files beside the store.

Every picture is a PNG named by what was asked for, with a JSON file of the same name that says what reproduces it. Both
are on the disk before the outcome is stored.
"""

import json
import math
import os
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import PIL.Image
import PIL.ImageOps

from biasunlearn_trainer.data_builders.clip_similarity import ClipSimilarity
from biasunlearn_trainer.data_builders.diffusion import Diffusion, Drawing, Drawn, check_installed
from biasunlearn_trainer.data_builders.images import content_digest, image_bytes, image_fault
from biasunlearn_trainer.data_builders.prompt_templates import text_of
from biasunlearn_trainer.data_builders.stages import Outcome, StageError
from biasunlearn_trainer.data_builders.store import digest
from biasunlearn_trainer.version import __version__

MAX_SEED = 2**63


class NotDrawable(Exception):
    """A row that no picture can be drawn for: `reason` and `detail` of the reject."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Asked:
    """What is asked for a row: the prompt, the text that CLIP compares with, whether the row's picture is the start."""

    prompt: str
    caption: str
    from_picture: bool


@dataclass(eq=False, kw_only=True)
class PictureStage:
    """An item stage that draws one picture a row.

    Args:
        pipeline: a Hub id, or a folder with a pipeline of diffusers; its weights have to be safetensors.
        revision: of a Hub id: a branch, a tag, or, to be sure, a commit.
        variant: of the weights' files, for instance fp16.
        dtype: of the weights; auto: float16 on an accelerator, float32 on the CPU.
        size: pixels of the longer side, a multiple of 8; None: what the pipeline was trained on.
        steps: of denoising; None: the pipeline's default, as for all that follow.
        guidance_scale: how closely the prompt is followed, 0 or more.
        negative_prompt: what is not to be seen.
        safety_checker: use the pipeline's own checker, and leave out what it flags. Only `safety_checker: false` in the
            recipe switches it off; then, or where a pipeline has none, that is logged and stands beside each picture.
        clip_model: a CLIP model that compares what was drawn; None: nothing does.
        compare_with: with the prompt, or with the row's own picture.
        min_similarity: from which cosine similarity on a picture stays, in -1..1. A text and a picture that fit have
            about 0.2 to 0.35 with OpenAI's models, two pictures far more; look at the rejects to choose it.
        max_attempts: how often a picture is drawn at most, each time with another seed, until it passes the checks.
        seed: from which, with the row's key, each picture's own is derived.
        batch_size: pictures at once. The same noise is drawn for any, but a picture's last bits hang on its batch.
        device: where it runs; None: an accelerator that is free, or, under `accelerate launch`, each process's own.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a value out of range, a pipeline that is not there.
    """

    name: ClassVar[str]
    # The engine sets it: where the pictures go.
    folder: ClassVar[Path | None] = None
    # Several processes share the items (`processes.py`).
    is_shared: ClassVar[bool] = True

    pipeline: str
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    size: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    safety_checker: bool = True
    clip_model: str | None = None
    compare_with: Literal["prompt", "original"] = "prompt"
    min_similarity: float = 0.2
    max_attempts: int = 1
    seed: int = 0
    batch_size: int = 1
    device: str | None = None

    def _task(self) -> str:
        raise TypeError(f"{type(self).__name__} says no task.")

    def _own_settings(self) -> dict[str, Any]:
        """Those of its settings that a subclass adds."""
        return {}

    def _call(self) -> dict[str, Any]:
        """Arguments of the pipeline; None: its default."""
        named = {"guidance_scale": self.guidance_scale, "negative_prompt": self.negative_prompt}
        return {"num_inference_steps": self.steps, **named}

    def __post_init__(self):
        """Checks the options; loads nothing."""
        check_installed()
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))
        names = ("revision", "variant", "dtype", "device", "safety_checker", "size")
        given = {name: getattr(self, name) for name in names}
        self._diffusion = Diffusion(self.pipeline, self._task(), call=self._call(), **given)
        self.settings = {
            **self._diffusion.identity,
            "revision": self.revision,
            "variant": self.variant,
            "dtype": self.dtype,
            "size": self.size,
            **self._call(),
            "safety_checker": self.safety_checker,
            "seed": self.seed,
            **self._own_settings(),
        }
        if self.clip_model:
            checks = {"compare_with": self.compare_with, "min_similarity": self.min_similarity}
            self.settings |= {"clip_model": _name(self.clip_model), **checks}
        self._clip: ClipSimilarity | None = None

    def _faults(self) -> Iterator[str]:
        for name in ("steps", "size", "batch_size", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"`{name}` must be 1 or more, got {value}"
        if self.size is not None and self.size % 8:
            yield f"`size` must be a multiple of 8, got {self.size}; nearest: {max(8, round(self.size / 8) * 8)}"
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            yield f"`guidance_scale` must be 0 or more, got {self.guidance_scale}"
        if not -1 <= self.min_similarity <= 1:
            yield f"`min_similarity` must be in -1..1, got {self.min_similarity}"

    def _asked(self, row: dict) -> Asked:
        """What to draw for a row. Raises NotDrawable."""
        raise TypeError(f"{type(self).__name__} asks for nothing.")

    def _columns(self, row: dict) -> dict[str, Any]:
        """The columns that the row gets beside those of its picture."""
        return {}

    def key(self, row: dict) -> str:
        """Rows that ask for the same picture of the same item get the same one."""
        try:
            asked = self._asked(row)
        except NotDrawable as err:
            asked = Asked(err.reason, err.detail, False)
        needs_picture = asked.from_picture or (self.clip_model and self.compare_with == "original")
        original = [_stored_digest(image) for image in row.get("images") or []] if needs_picture else []
        return digest([self._columns_key(row), asked.prompt, asked.caption, original])

    def _columns_key(self, row: dict) -> list[Any]:
        return [row.get("source"), row.get("source_id")]

    def do(self, rows: list[dict], attempt: int = 0) -> list[Outcome]:
        """Draws, checks and writes; another attempt takes another seed."""
        found = [self._prepared(row, attempt) for row in rows]
        drawn = iter(self._diffusion.draw([drawing for drawing in found if isinstance(drawing, Drawing)]))
        return [
            self._outcome(row, drawing, next(drawn), attempt) if isinstance(drawing, Drawing) else drawing
            for row, drawing in zip(rows, found, strict=True)
        ]

    def _prepared(self, row: dict, attempt: int) -> Drawing | Outcome:
        try:
            asked = self._asked(row)
            original = None
            if asked.from_picture:
                original = _opened(row)
            for check in (self._diffusion, self._checker()):
                excess = check.too_long(asked.prompt if check is self._diffusion else asked.caption) if check else None
                if excess:
                    raise NotDrawable("over the text encoder's limit", f"{excess}: {asked.prompt}")
        except NotDrawable as err:
            return Outcome(reason=err.reason, detail=err.detail)
        # The first attempt's seed is that of a recipe without attempts.
        parts = [self.seed, self.key(row), *([attempt] if attempt else [])]
        return Drawing(asked.prompt, int(digest(parts), 16) % MAX_SEED, original)

    def _checker(self) -> ClipSimilarity | None:
        if self.clip_model and self._clip is None:
            self._clip = ClipSimilarity(self.clip_model, self._diffusion.device())
        return self._clip

    def _outcome(self, row: dict, drawing: Drawing, drawn: Drawn, attempt: int) -> Outcome:
        if drawn.picture is None:
            return Outcome(reason=drawn.reason, detail=f"{drawn.detail} {drawing.prompt}".strip(), retry=True)
        columns = {"drawn_by": self.settings["pipeline"], "drawn_prompt": drawing.prompt, "drawn_seed": drawing.seed}
        if self.clip_model:
            try:
                columns["drawn_similarity"] = round(self._similarity(row, drawn.picture), 6)
            except NotDrawable as err:
                return Outcome(reason=err.reason, detail=err.detail)
            if columns["drawn_similarity"] < self.min_similarity:
                detail = f"similarity {columns['drawn_similarity']:.3f} to the {self.compare_with}: {drawing.prompt}"
                return Outcome(reason="not alike", detail=detail, retry=True)
        name = f"{self.key(row)}.png"
        self._write(row, name, drawing, drawn.picture, columns, attempt)
        return Outcome({"picture": name, "columns": columns})

    def _similarity(self, row: dict, picture: PIL.Image.Image) -> float:
        if self.compare_with == "original":
            return self._checker().to_picture(picture, _opened(row))
        return self._checker().to_text(picture, self._asked(row).caption)

    def _write(
        self, row: dict, name: str, drawing: Drawing, picture: PIL.Image.Image, columns: Mapping[str, Any], attempt: int
    ) -> None:
        path = self.folder / name
        _write_whole(path, lambda file: picture.save(file, format="PNG"))
        original = None
        if drawing.original is not None:
            original = {"name": _image_name(row["images"][0]), "blake2b": _stored_digest(row["images"][0])}
        record = {
            **self._diffusion.provenance(drawing),
            "stage": self.name,
            "stage_seed": self.seed,
            "attempt": attempt,
            "source": row.get("source"),
            "source_id": row.get("source_id"),
            "original": original,
            "similarity": columns.get("drawn_similarity"),
            "clip_model": _name(self.clip_model) if self.clip_model else None,
            "compare_with": self.compare_with if self.clip_model else None,
            "picture": {"file": name, "blake2b": content_digest(path.read_bytes()).hex()},
        }
        record["versions"]["biasunlearn_trainer"] = __version__
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"
        _write_whole(path.with_suffix(".json"), lambda file: file.write(text.encode()))

    def rows_from(self, row: dict, made: Mapping[str, Any]) -> Iterator[dict]:
        """The rows that go on of a row and its stored outcome."""
        yield {**row, **made["columns"], **self._columns(row), "images": [self._picture(made)]}

    def _picture(self, made: Mapping[str, Any]) -> str:
        path = (self.folder / made["picture"]).absolute()
        if not path.is_file():
            raise StageError(
                f"the picture {path} was drawn and is gone. Put it back, or remove {self.folder}.jsonl to draw again."
            )
        return str(path)

    def close(self) -> None:
        """Lets the weights go."""
        self._diffusion.close()
        if self._clip is not None:
            self._clip.close()


def slots_of(template: str, option: str) -> tuple[str, ...]:
    """The names in braces of a template.

    Raises:
        ValueError: braces that are not names.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as err:
        raise ValueError(f"`{option}` is {template!r}: {err}") from err
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"`{option}` is {template!r}; expected names in braces, for instance {{completion}}")
    return tuple(names)


def column_text(row: Mapping[str, Any], column: str) -> str:
    """What a column says, on one line. Raises NotDrawable where it says nothing."""
    value = row.get(column)
    text = "" if value is None else " ".join(text_of(value).split()) if isinstance(value, str | list) else str(value)
    if not text:
        raise NotDrawable("nothing to draw from", f"the row has no `{column}`")
    return text


def _opened(row: Mapping[str, Any]) -> PIL.Image.Image:
    """The row's only picture, upright and in RGB. Raises NotDrawable."""
    images = row.get("images") or []
    if len(images) != 1:
        raise NotDrawable("no picture" if not images else "several pictures", f"{len(images)} pictures, expected one")
    fault = image_fault(images[0])
    if fault:
        folder = os.path.dirname(str(images[0]))
        raise NotDrawable("picture cannot be opened", fault.replace(f"{folder}{os.sep}", "") if folder else fault)
    with PIL.Image.open(images[0]) as picture:
        return PIL.ImageOps.exif_transpose(picture).convert("RGB")


def _stored_digest(image: Any) -> str:
    """The digest of a picture's file; of one that cannot be read its name, so that a mended one is asked anew."""
    try:
        return content_digest(image_bytes(image)).hex()
    except (OSError, TypeError, KeyError):
        return f"unread {_image_name(image)}"


def _image_name(image: Any) -> str:
    return os.path.basename(str(image.get("path") if isinstance(image, dict) else image))


def _name(model: str) -> str:
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def _write_whole(path: Path, write: Any) -> None:
    """Writes a file that is there whole or not at all, and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
