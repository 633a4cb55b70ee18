"""Rows -> padded tensors with a completion mask, for text and image-text models alike.

The mask is read off the processor's own output: the ids of the prompt alone must begin the ids of prompt +
completion. Image placeholders expand to hundreds of tokens inside the processor, so nothing is ever counted on the
raw text.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from biasunlearn_trainer.models import (
    image_placeholder,
    image_token_id,
    lays_image_tokens,
    template_owner,
    tokenizer_of,
)

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


class _Rendered(NamedTuple):
    """One row as text: the prompt alone, and prompt + completion."""

    prompt: str
    full: str
    templated: bool


class CompletionCollator:
    """Collate the rows of one stream.

    Args:
        processing_class: the model's tokenizer, or its processor where rows carry images.
        max_length: longest sequence in tokens; None keeps everything. What is too long loses the start of its prompt
            first and the end of its completion next; image tokens, and what frames them, are never cut.
        append_eos: end plain-text completions with the tokenizer's EOS, as TRL does. Chat rows end as their template
            says.

    Example:
        >>> collate = CompletionCollator(tokenizer)  # doctest: +SKIP
        >>> collate([{"prompt": "Who was late?", "completion": " It cannot be known."}]).keys()  # doctest: +SKIP
        dict_keys(['input_ids', 'attention_mask', 'completion_mask'])
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        max_length: int | None = None,
        append_eos: bool = True,
    ):
        self.processing_class = processing_class
        self.max_length = max_length
        self.append_eos = append_eos
        self.tokenizer = tokenizer_of(processing_class)
        self._empty_ids = self.tokenizer("")["input_ids"]
        eos = self.tokenizer.eos_token_id
        self._adds_eos = len(self._empty_ids) > 0 and self._empty_ids[-1] == eos != self.tokenizer.bos_token_id
        self.image_token_id = image_token_id(processing_class)
        self._lays_image_tokens = lays_image_tokens(processing_class)
        self._warned_of_truncation = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate rows into one batch.

        Args:
            rows: at least one row, all with images or all without.

        Returns:
            (B, T) `input_ids`, `attention_mask` (int64) and `completion_mask` (bool), right-padded, and whatever else
            the processor made for the model (`pixel_values`, ...).

        Raises:
            ValueError: naming the row, where a prompt is no prefix of its full text, nothing is left of a completion,
                an image and its placeholder do not match, or truncation would cut image tokens.
        """
        images = _images_of(rows)
        rendered = self._render_all(rows, images)
        images = _opened(images)
        templated = rendered[0].templated
        batch = self._encode([r.full for r in rendered], images, templated, padding_side="right")
        prompts = self._encode_prompts([r.prompt for r in rendered], batch, images, templated)
        batch["completion_mask"] = self._completion_mask(batch, prompts, rows)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            batch = self._truncate(batch, rows)
        return batch

    def prompt_batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The prompts alone, left-padded, ready for `model.generate`."""
        images = _images_of(rows)
        rendered = self._render_all(rows, images)
        prompts = [r.prompt for r in rendered]
        return self._encode(prompts, _opened(images), rendered[0].templated, padding_side="left")

    def _render_all(self, rows: Sequence[Row], images: list[list]) -> list[_Rendered]:
        rendered = []
        for position, (row, pictures) in enumerate(zip(rows, images, strict=True)):
            try:
                rendered.append(self._render(row, pictures))
            except (ValueError, KeyError) as err:
                raise ValueError(f"{_name(row, position)}: {err}") from err
        if len({r.templated for r in rendered}) > 1:
            raise ValueError("A batch mixes plain-text and chat rows. Write all rows of a set in one of the two forms.")
        return rendered

    def _render(self, row: Row, images: list) -> _Rendered:
        """The row as text, with a placeholder for each of its images."""
        if images and not isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"the row has {len(images)} image(s), but {type(self.processing_class).__name__} takes text only. "
                "Use an image-text model with its processor, or drop the `images` column."
            )
        if isinstance(row["prompt"], str):
            rendered = self._render_plain(row["prompt"], row["completion"], len(images))
        else:
            rendered = self._render_chat(list(row["prompt"]), list(row["completion"]), images)
        self._check_placeholders(rendered, len(images))
        return rendered

    def _render_chat(self, prompt: list, completion: list, images: list) -> _Rendered:
        owner = template_owner(self.processing_class)
        if not owner.chat_template:
            raise ValueError(
                f"the row is a chat, and {type(self.processing_class).__name__} has no chat template. Set "
                "`chat_template` on its tokenizer, or write the row's prompt and completion as plain text."
            )
        if isinstance(self.processing_class, ProcessorMixin):
            prompt, completion = prepare_multimodal_messages(prompt, images), prepare_multimodal_messages(completion)
        if self._lays_image_tokens and not self._placeholder:
            prompt, completion = _texts_only(prompt), _texts_only(completion)
        continues = prompt[-1]["role"] == "assistant"
        template = owner.apply_chat_template
        return _Rendered(
            template(prompt, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues),
            template([*prompt, *completion], tokenize=False),
            templated=True,
        )

    def _render_plain(self, prompt: str, completion: str, num_images: int) -> _Rendered:
        if num_images and str(self.processing_class.image_token) not in prompt:
            prompt = self._placeholder * num_images + prompt
        if not prompt and not self._empty_ids:
            # GPT-2 and Qwen put no BOS by themselves; the first token of a sentence still needs one to follow.
            prompt = self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        eos = self.tokenizer.eos_token
        if eos is not None and self.append_eos and not self._adds_eos and not completion.endswith(eos):
            completion += eos
        return _Rendered(prompt, prompt + completion, templated=False)

    @cached_property
    def _placeholder(self) -> str:
        return image_placeholder(self.processing_class)

    def _check_placeholders(self, rendered: _Rendered, num_images: int) -> None:
        """Raise a ValueError where a row has another number of placeholders than of images, or one in its completion.

        The processor would name no row, and some models would lay the features of one image over another.
        """
        token = getattr(self.processing_class, "image_token", None)
        if token is None:
            return
        present = rendered.prompt.count(str(token))
        in_completion = rendered.full.count(str(token)) - present
        if in_completion:
            raise ValueError(
                f"the completion has {in_completion} placeholder(s) {token!s}. A model answers in text; write "
                "placeholders in the prompt alone."
            )
        if self._lays_image_tokens and present == 0 and num_images > 1:
            raise ValueError(
                f"{type(self.processing_class).__name__} puts one image before the text, and the row has {num_images} "
                f"of them. Write {token!s} in the prompt where each belongs, or keep one image."
            )
        expected = num_images * (self._placeholder.count(str(token)) if num_images else 0)
        if present != expected and not (self._lays_image_tokens and present == num_images):
            raise ValueError(
                f"the prompt has {present} placeholder(s) {token!s} for {num_images} image(s). "
                "Write one for each image, or none at all: then they are put before the prompt."
            )

    def _encode(self, texts: list[str], images: list[list], templated: bool, padding_side: str) -> dict[str, Tensor]:
        options = {
            "padding": True,
            "padding_side": padding_side,
            "return_tensors": "pt",
            "add_special_tokens": not templated,  # a chat template writes its own BOS
        }
        if any(images) and self._lays_image_tokens and self._have_placeholders(texts):
            return self._encode_in_place(texts, images, options)
        if any(images):
            return dict(self.processing_class(text=texts, images=images, **options))
        # Made into tensors here: the tokenizer's own way looks at every number in Python, and makes floats of none.
        encoded = self.tokenizer(texts, **{**options, "return_tensors": None})
        return {name: torch.tensor(encoded[name], dtype=torch.long) for name in ("input_ids", "attention_mask")}

    def _encode_prompts(
        self, texts: list[str], batch: dict[str, Tensor], images: list[list], templated: bool
    ) -> dict[str, Tensor]:
        """The prompts alone, right-padded, without putting their pictures through the image processor again.

        The whole rows say how many tokens each picture has. With as many in its place a prompt needs the tokenizer
        alone. What comes out is taken if it begins the row's ids; else the processor itself is asked.
        """
        if any(images) and not self._lays_image_tokens:
            spelled = [self._spell_out(text, ids) for text, ids in zip(texts, batch["input_ids"], strict=True)]
            if None not in spelled:
                prompts = self._encode(spelled, [[] for _ in spelled], templated, padding_side="right")
                if self._begin(prompts, batch):
                    return prompts
        return self._encode(texts, images, templated, padding_side="right")

    def _spell_out(self, text: str, ids: Tensor) -> str | None:
        """The prompt with each placeholder as often as its picture has tokens; None where the two do not correspond."""
        is_image = (ids == self.image_token_id).long()
        edges = torch.diff(is_image, prepend=is_image.new_zeros(1), append=is_image.new_zeros(1))
        lengths = (edges == -1).nonzero()[:, 0] - (edges == 1).nonzero()[:, 0]
        token = str(self.processing_class.image_token)
        first, *others = text.split(token)
        if len(others) != len(lengths):
            return None
        return first + "".join(token * int(n) + part for n, part in zip(lengths, others, strict=True))

    def _begin(self, prompts: dict[str, Tensor], batch: dict[str, Tensor]) -> bool:
        """Whether every prompt begins its row."""
        width = prompts["input_ids"].shape[1]
        if width > batch["input_ids"].shape[1]:
            return False
        same = prompts["input_ids"] == batch["input_ids"][:, :width]
        if self._adds_eos:  # the prompt's own EOS is no part of the row
            lengths = prompts["attention_mask"].sum(1, keepdim=True)
            same |= torch.arange(width) == lengths - 1
        return bool((same | ~prompts["attention_mask"].bool()).all())

    def _have_placeholders(self, texts: list[str]) -> bool:
        present = {str(self.processing_class.image_token) in text for text in texts}
        if len(present) > 1:
            raise ValueError(
                f"A batch mixes prompts with {self.processing_class.image_token!s} and without, whose image tokens "
                "stand in other places. Write it in all prompts of a set, or in none."
            )
        return present.pop()

    def _encode_in_place(self, texts: list[str], images: list[list], options: dict[str, Any]) -> dict[str, Tensor]:
        """Image tokens where the text has its placeholders, which a processor that lays its own would put in front."""
        token = str(self.processing_class.image_token)
        texts = [text.replace(token, token * self.processing_class.num_query_tokens) for text in texts]
        encoded = self.tokenizer(texts, **options)
        pictures = self.processing_class.image_processor(images, return_tensors=options["return_tensors"])
        return {name: encoded[name].long() for name in ("input_ids", "attention_mask")} | dict(pictures)

    def _completion_mask(self, batch: dict[str, Tensor], prompts: dict[str, Tensor], rows: Sequence[Row]) -> Tensor:
        """(B, T) bool, true from the end of the prompt to the end of the row.

        Lengths come from the attention mask and never from the pad id: where pad == eos, a real EOS must stay visible.
        """
        lengths = batch["attention_mask"].sum(1)
        prompt_lengths = prompts["attention_mask"].sum(1) - (
            1 if self._adds_eos and prompts["input_ids"].numel() else 0
        )
        for i, (row, length) in enumerate(zip(rows, prompt_lengths.tolist(), strict=True)):
            if not torch.equal(batch["input_ids"][i, :length], prompts["input_ids"][i, :length]):
                raise ValueError(self._prefix_message(row, i, batch["input_ids"][i], prompts["input_ids"][i, :length]))
            if length >= lengths[i]:
                raise ValueError(
                    f"{_name(row, i)}: all labels are masked, the completion {row['completion']!r} adds no token to "
                    "its prompt. Give it at least one, or drop the row."
                )
            if length == 0:
                raise ValueError(
                    f"{_name(row, i)}: the prompt is empty and the tokenizer has no BOS or EOS to stand before the "
                    "completion. Give the row a prompt."
                )
        positions = torch.arange(batch["input_ids"].shape[1])
        return (positions >= prompt_lengths[:, None]) & (positions < lengths[:, None])

    def _prefix_message(self, row: Row, position: int, full: Tensor, prompt: Tensor) -> str:
        same = int((full[: len(prompt)] == prompt).long().cumprod(0).sum())
        return (
            f"{_name(row, position)}: the ids of the prompt are no prefix of the ids of prompt + completion; they "
            f"part at token {same} (prompt alone: {self.tokenizer.decode(prompt[same:][:4])!r}, with its completion: "
            f"{self.tokenizer.decode(full[same:][:4])!r}). Usually a space stands at the end of the prompt where it "
            f"should begin the completion. Got prompt {_shorten(row['prompt'])}, "
            f"completion {_shorten(row['completion'])}."
        )

    def _truncate(self, batch: dict[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
        """Cut every row to `max_length`: the start of its prompt first, then the end of its completion."""
        if not self._warned_of_truncation:
            logger.warning("Rows longer than max_length=%d tokens are cut.", self.max_length)
            self._warned_of_truncation = True
        shape = batch["input_ids"].shape
        per_token = [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape]
        kept = [self._kept_positions(batch, i, row) for i, row in enumerate(rows)]
        width = max(map(len, kept))
        for name in per_token:
            filler = self.tokenizer.pad_token_id if name == "input_ids" else 0
            cut = batch[name].new_full((shape[0], width), filler)
            for i, positions in enumerate(kept):
                cut[i, : len(positions)] = batch[name][i, positions]
            batch[name] = cut
        return batch

    def _kept_positions(self, batch: dict[str, Tensor], i: int, row: Row) -> list[int]:
        length = int(batch["attention_mask"][i].sum())
        overflow = length - self.max_length
        if overflow <= 0:
            return list(range(length))
        completion_start = int(batch["completion_mask"][i].long().argmax())
        kept = self._uncuttable(batch["input_ids"][i, :completion_start])
        cut = [position for position in range(completion_start) if not kept[position]][:overflow]
        end = length - (overflow - len(cut))
        if end <= completion_start:
            raise ValueError(
                f"{_name(row, i)}: {length} tokens do not fit max_length={self.max_length} without cutting image "
                f"tokens or the whole completion (prompt {completion_start}, completion {length - completion_start}). "
                "Raise max_length, or shorten the row."
            )
        return [position for position in range(end) if position not in set(cut)]

    def _uncuttable(self, prompt: Tensor) -> list[bool]:
        """What truncation leaves of a prompt's ids (T,): BOS, image tokens with what frames them, the last token."""
        is_image = prompt == self.image_token_id if self.image_token_id is not None else torch.zeros_like(prompt).bool()
        kept = is_image.tolist()
        special = set(self.tokenizer.all_special_ids)
        # Qwen2-VL's <|vision_start|> and <|vision_end|>: an image without them is none.
        for i in torch.nonzero(is_image).flatten().tolist():
            for neighbour in (i - 1, i + 1):
                if 0 <= neighbour < len(kept) and int(prompt[neighbour]) in special:
                    kept[neighbour] = True
        if self._empty_ids:
            kept[0 if not is_image[0] else int(is_image.long().argmin())] = True  # BLIP-2's BOS follows its image
        kept[-1] = True
        return kept


class StreamCollator:
    """Collate draws of `PairedStreams`: one `CompletionCollator` batch per stream, under the stream's name.

    Args:
        collator: how a stream's rows become tensors.

    A row's place in its set travels along as `index` (B,), so that values computed once per row (precomputed reference
    log-probabilities) find it again, and the number of its images as `num_images` (B,).
    """

    def __init__(self, collator: CompletionCollator):
        self.collator = collator

    def __call__(self, draws: Sequence[Mapping[str, Sequence[Row]]]) -> dict[str, dict[str, Tensor]]:
        """Collate draws, each a mapping of stream name to rows."""
        batch = {}
        for stream in draws[0]:
            rows = [row for draw in draws for row in draw[stream]]
            try:
                batch[stream] = self.collator(rows)
            except ValueError as err:
                raise ValueError(f"{stream} set, {err}") from err
            batch[stream]["index"] = torch.tensor([row["index"] for row in rows])
            batch[stream]["num_images"] = torch.tensor([len(row.get("images") or []) for row in rows])
        return batch


def choose_rows(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], from_second: Tensor, pad_token_id: int
) -> dict[str, Tensor]:
    """Put a batch together row by row from two of the same size, for instance the two sides of pairs.

    Args:
        first: what `StreamCollator` made of one stream, B rows.
        second: the same of an aligned stream.
        from_second: (B,) bool, which rows to take of the second.
        pad_token_id: fills up the ids of the shorter batch.

    Returns:
        B rows. The model runs once however they are mixed, as collectives over several processes need it to.
    """
    if not from_second.any():
        return dict(first)
    if from_second.all():
        return dict(second)
    width = max(batch["input_ids"].shape[1] for batch in (first, second))
    rows = [split_rows(_widen(batch, width, pad_token_id)) for batch in (first, second)]
    return {
        name: torch.cat([rows[side][name][i] for i, side in enumerate(from_second.long().tolist())]) for name in first
    }


def form_of(batch: Mapping[str, Tensor]) -> int:
    """A number that is the same for batches which `join_batches` can put together, in every process.

    They have the same entries: all pictures or none, and pictures of one size.
    """
    shape = batch["input_ids"].shape
    entries = sorted(
        f"{name} {value.dtype} {'text' if value.shape == shape else [*value.shape[1:]]}"
        for name, value in batch.items()
    )
    return zlib.crc32(" ".join(entries).encode())


def join_batches(batches: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Put the rows of several batches one behind the other.

    Args:
        batches: what `CompletionCollator` made, of one `form_of`.
        pad_token_id: fills up the ids of shorter batches.
    """
    width = max(batch["input_ids"].shape[1] for batch in batches)
    widened = [_widen(batch, width, pad_token_id) for batch in batches]
    return {name: torch.cat([batch[name] for batch in widened]) for name in widened[0]}


def _widen(batch: Mapping[str, Tensor], width: int, pad_token_id: int) -> dict[str, Tensor]:
    shape = batch["input_ids"].shape
    return {
        name: pad(value, (0, width - shape[1]), value=pad_token_id if name == "input_ids" else 0)
        if value.shape == shape
        else value
        for name, value in batch.items()
    }


def split_rows(batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Each tensor cut into what belongs to each row: one entry, one for each image, or one for each image patch."""
    num_rows = len(batch["input_ids"])
    images = batch["num_images"].tolist()
    counts = {num_rows: [1] * num_rows, sum(images): images}
    if (grid := batch.get("image_grid_thw")) is not None:
        patches = [int(part.prod(-1).sum()) for part in grid.split(images)]
        counts |= {sum(patches): patches}
    # Rows with images have one at least: as many images as rows is one each, and either cut is right.
    return {name: value.split(counts[len(value)]) for name, value in batch.items()}


def _texts_only(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is one text, for templates that know no parts."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"] if part["type"] == "text")}
        for message in messages
    ]


def _images_of(rows: Sequence[Row]) -> list[list]:
    images = [list(row.get("images") or []) for row in rows]
    if any(images) and not all(images):
        raise ValueError("A batch mixes rows with and without images. Collate them apart, as `PairedStreams` does.")
    return images


def _opened(images: list[list]) -> list[list]:
    """The rows' pictures; those that are named by their files, decoded the same way for every image processor."""
    return [[_open(image) if isinstance(image, str | os.PathLike) else image for image in row] for row in images]


def _open(path: str | os.PathLike) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _name(row: Row, position: int) -> str:
    return f"row {row.get('index', position)}"


def _shorten(text: Any, limit: int = 80) -> str:
    shown = repr(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
