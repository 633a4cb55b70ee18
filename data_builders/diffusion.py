"""Pictures by a pipeline of `diffusers`: loading it safely, drawing by seed, and what is to be known of a picture.

What decides a picture is the pipeline, its settings, the prompt, the seed and the picture it starts from. Noise is
drawn on the CPU, by one generator a picture, so that it is the same on every device and in every batch.
"""

import importlib.metadata
import importlib.util
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps

from biasunlearn_trainer.data_builders.images import nearest_files
from biasunlearn_trainer.data_builders.loading import one_at_a_time
from biasunlearn_trainer.data_builders.stages import StageError
from biasunlearn_trainer.data_builders.store import digest

logger = logging.getLogger(__name__)

TASKS = ("text_to_image", "image_to_image", "instruct")
INDEX = "model_index.json"
SMALL = 2**20
"""Bytes up to which a file of a local pipeline is read for its fingerprint: configurations, no weights."""
UNLIMITED = 10**6
"""Tokenizers without a limit of their own say int(1e30)."""


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn: a prompt (or an instruction), a seed in 0..2^63-1, and the picture to start from, if any."""

    prompt: str
    seed: int
    original: PIL.Image.Image | None = None


@dataclass(frozen=True)
class Drawn:
    """A picture, or the reason why it cannot be used and what is particular to it."""

    picture: PIL.Image.Image | None = None
    reason: str | None = None
    detail: str = ""


def check_installed() -> None:
    """Raises an ImportError that says what to install, without importing it."""
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError("pictures are drawn by diffusers: pip install 'biasunlearn_trainer[generate]'")


def identify(pipeline: str) -> dict[str, str]:
    """Names a pipeline without folders of this machine: a Hub id as it is, a folder by its name and what is in it.

    Raises:
        ValueError: a path where there is no pipeline.
    """
    folder = Path(pipeline).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(f"`pipeline` is {pipeline!r}, a folder without {INDEX}: it holds no pipeline of diffusers")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
        content = [(path.relative_to(folder).as_posix(), _content(path)) for path in files]
        return {"pipeline": folder.resolve().name, "files": digest(content)[:12]}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", pipeline) or pipeline.startswith((".", "~")):
        near = ", ".join(nearest_files(folder))
        hint = f"; nearest there: {near}" if near else ""
        raise ValueError(f"`pipeline` is {pipeline!r}: neither a folder that is there nor a Hub id (owner/name){hint}")
    return {"pipeline": pipeline}


def _content(path: Path) -> Any:
    size = path.stat().st_size
    return path.read_bytes().hex() if size <= SMALL else size


class Diffusion:
    """A pipeline, loaded when the first picture is asked for.

    Weights are read from safetensors files alone and no code of a repository is run: a pickle could run anything.

    Args:
        pipeline: a Hub id or a folder.
        task: one of `TASKS`. `instruct` takes the class that the pipeline itself names (InstructPix2Pix, FluxKontext);
            the others are found by diffusers' Auto classes, whatever the family.
        revision: of a Hub id.
        variant: of the weights' files ("fp16").
        dtype: of the weights; "auto": float16 on an accelerator, float32 on the CPU.
        device: where it runs; None: that of this process (accelerate).
        safety_checker: whether the pipeline's own is used.
        size: pixels of the longer side, a multiple of 8; None: what the pipeline was trained on.
        call: of the pipeline's own arguments, those that are set.
    """

    def __init__(
        self,
        pipeline: str,
        task: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        safety_checker: bool = True,
        size: int | None = None,
        call: Mapping[str, Any] | None = None,
    ):
        self.identity = identify(pipeline)
        folder = Path(pipeline).expanduser()
        pipeline = str(folder) if folder.is_dir() else pipeline
        self._pipeline, self._task, self._revision, self._variant = pipeline, task, revision, variant
        self._dtype, self._device, self._wants_checker, self._size = dtype, device, safety_checker, size
        self._call, self._pipe = {key: value for key, value in (call or {}).items() if value is not None}, None

    @one_at_a_time
    def load(self) -> None:
        """Loads the pipeline, once.

        Raises:
            StageError: there is none, its weights are pickles, it brings code of its own, or it does not do the task.
        """
        if self._pipe is not None:
            return
        import torch

        device = self.device()
        dtype = {"auto": "float32" if device == "cpu" else "float16"}.get(self._dtype, self._dtype)
        try:
            pipe = _pipeline_class(self._task).from_pretrained(
                self._pipeline,
                revision=self._revision,
                variant=self._variant,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError) as err:
            fault = f"the pipeline {self._pipeline!r} cannot be loaded for {self._task}: {_said(err)}"
            raise StageError(fault) from err
        self._check(pipe)
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._dtype = pipe.to(device), dtype

    def device(self) -> str:
        """Where it runs: what was asked for, or the device that accelerate gives to this process."""
        if self._device is None:
            import torch
            from accelerate import PartialState

            device = PartialState(cpu=not torch.accelerator.is_available()).device
            # Launched processes are given "cpu:0".
            self._device = "cpu" if device.type == "cpu" else str(device)
        return self._device

    def _check(self, pipe: Any) -> None:
        accepted = inspect.signature(pipe.__call__).parameters
        wanted = {**self._call, "prompt": None, "generator": None}
        if self._task != "text_to_image":
            wanted["image"] = None
        for name in wanted:
            if name not in accepted:
                kind = type(pipe).__name__
                raise StageError(f"{kind} ({self._pipeline}) takes no `{name}`, which {self._task} needs.")
        self._check_steps(accepted)
        if "safety_checker" not in pipe.components or pipe.safety_checker is None:
            self.checker = "none in this pipeline"
            logger.warning("%s has no safety checker: nobody looks at its pictures before you do.", self._pipeline)
        elif self._wants_checker:
            self.checker = type(pipe.safety_checker).__name__
        else:
            self.checker = "switched off"
            pipe.safety_checker = None
            logger.warning("%s: the safety checker was switched off (`safety_checker: false`).", self._pipeline)

    def _check_steps(self, accepted: Mapping[str, inspect.Parameter]) -> None:
        """A variation takes the share `strength` of the steps; with none of them some pipelines fail in the decoder."""
        if self._task != "image_to_image" or not {"strength", "num_inference_steps"} <= set(accepted):
            return
        named = ("num_inference_steps", "strength")
        steps, strength = (self._call.get(name, accepted[name].default) for name in named)
        if int(steps * strength) < 1:
            raise StageError(
                f"{steps} step(s) with `strength` {strength} leave none to draw; their product must be 1 or more."
            )

    def too_long(self, prompt: str) -> str | None:
        """Says how far a prompt goes over the limit of one of the text encoders, or None: it would be cut silently."""
        self.load()
        for name, tokenizer in self._tokenizers():
            limit = min(tokenizer.model_max_length, _sequence_limit(self._pipe, tokenizer))
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if limit < UNLIMITED and count > limit:
                return f"{count} tokens, {name} takes {limit}"
        return None

    def _tokenizers(self) -> list[tuple[str, Any]]:
        found = ((name, getattr(self._pipe, name, None)) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
        return [(name, tokenizer) for name, tokenizer in found if tokenizer is not None]

    def draw(self, drawings: Sequence[Drawing]) -> list[Drawn]:
        """Draws pictures, those that start from pictures of one size together.

        Raises:
            StageError: the device has too little memory, or as `load`.
        """
        self.load()
        sizes: dict[Any, list[int]] = {}
        ready = [self._fitted(drawing) for drawing in drawings]
        for place, original in enumerate(ready):
            sizes.setdefault(original.size if original else None, []).append(place)
        drawn: dict[int, Drawn] = {}
        for places in sizes.values():
            group = [drawings[place] for place in places]
            drawn.update(zip(places, self._drawn(group, [ready[place] for place in places]), strict=True))
        return [drawn[place] for place in range(len(drawings))]

    def _drawn(self, drawings: Sequence[Drawing], originals: Sequence[Any]) -> list[Drawn]:
        import torch

        given = dict(self._call)
        if originals[0] is not None:
            given["image"] = list(originals)
        elif self._size is not None:
            given |= {"height": self._size, "width": self._size}
        if "negative_prompt" in given:
            given["negative_prompt"] = [given["negative_prompt"]] * len(drawings)
        generators = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in drawings]
        try:
            with torch.inference_mode():
                made = self._pipe(prompt=[d.prompt for d in drawings], generator=generators, output_type="pil", **given)
        except torch.OutOfMemoryError as err:
            raise StageError(
                f"{self.device()} has too little memory for {len(drawings)} picture(s) at once. Take a smaller "
                "`batch_size` or `size`, or `dtype: float16`; what was drawn is stored."
            ) from err
        flagged = getattr(made, "nsfw_content_detected", None) or [False] * len(drawings)
        return [_judged(picture, flag) for picture, flag in zip(made.images, flagged, strict=True)]

    def _fitted(self, drawing: Drawing) -> PIL.Image.Image | None:
        """The picture to start from with its longer side as long as the pipeline's pictures are, in multiples of 8."""
        if drawing.original is None:
            return None
        width, height = drawing.original.size
        scale = self.size() / max(width, height)
        step = 8 * max(1, getattr(self._pipe, "vae_scale_factor", 8) // 8)
        size = tuple(max(step, round(side * scale / step) * step) for side in (width, height))
        return drawing.original.resize(size, PIL.Image.Resampling.LANCZOS)

    def size(self) -> int:
        """Pixels of the longer side."""
        if self._size is not None:
            return self._size
        self.load()
        side = getattr(self._pipe, "default_sample_size", None)
        model = getattr(self._pipe, "unet", None) or getattr(self._pipe, "transformer", None)
        side = side or getattr(getattr(model, "config", None), "sample_size", None) or 64
        return (max(side) if isinstance(side, list | tuple) else side) * getattr(self._pipe, "vae_scale_factor", 8)

    def provenance(self, drawing: Drawing) -> dict[str, Any]:
        """All that reproduces a picture but the weights and the original: as JSON, with the pipeline's own defaults."""
        self.load()
        parameters = inspect.signature(self._pipe.__call__).parameters
        named = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "strength", "negative_prompt")
        defaults = {name: parameters[name].default for name in named if name in parameters}
        original = self._fitted(drawing)
        width, height = original.size if original else (self.size(), self.size())
        return {
            **self.identity,
            "revision": self._revision,
            "commit": _commit(self._pipeline, self._revision),
            "variant": self._variant,
            "task": self._task,
            "class": type(self._pipe).__name__,
            "scheduler": {"class": type(self._pipe.scheduler).__name__, **_plain(self._pipe.scheduler.config)},
            "prompt": drawing.prompt,
            "seed": drawing.seed,
            "generator": "torch.Generator('cpu')",
            "call": {**defaults, **self._call, "width": width, "height": height},
            "dtype": self._dtype,
            "device": self.device(),
            "safety_checker": self.checker,
            "versions": {name: importlib.metadata.version(name) for name in ("diffusers", "torch", "transformers")},
        }

    def close(self) -> None:
        """Lets the weights go."""
        self._pipe = None


def _pipeline_class(task: str) -> Any:
    import diffusers

    name = {"text_to_image": "AutoPipelineForText2Image", "image_to_image": "AutoPipelineForImage2Image"}
    return getattr(diffusers, name.get(task, "DiffusionPipeline"))


def _judged(picture: PIL.Image.Image, flagged: bool) -> Drawn:
    if flagged:
        return Drawn(reason="flagged by the safety checker")
    if all(low == high for low, high in picture.convert("RGB").getextrema()):
        # What a decoder makes of numbers that overflowed in half precision, and what a checker leaves of a picture.
        return Drawn(reason="blank picture", detail=f"all {picture.convert('RGB').getpixel((0, 0))}")
    return Drawn(picture)


def _sequence_limit(pipe: Any, tokenizer: Any) -> int:
    """T5 encoders take what the pipeline's `max_sequence_length` says by default."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if parameter is None or "T5" not in type(tokenizer).__name__:
        return UNLIMITED
    return parameter.default if isinstance(parameter.default, int) else UNLIMITED


def _commit(pipeline: str, revision: str | None) -> str | None:
    """The commit of the snapshot in the Hub's cache; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(pipeline).is_dir():
        return None
    found = try_to_load_from_cache(pipeline, INDEX, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = bool | int | float | str | None
    return {key: value for key, value in config.items() if isinstance(value, plain) and not key.startswith("_")}


def _said(err: Exception) -> str:
    """The first words of an error: those of the Hub go on for many lines."""
    return " ".join(str(err).split())[:400] or type(err).__name__
