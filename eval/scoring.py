"""Scores and answers of a model: the only file of the evaluation that touches one.

Batches are formed over all rows, and dealt whole to the processes: batch i goes to rank i mod world. Each batch is
therefore the same for any number of processes, and so are the scores in it. Rows that begin alike, with the same
picture or the same words, come into one batch, where what they share is computed once (`shared_prefixes`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import generating_model
from biasunlearn_trainer.eval.batches import Outline, Row, batches_by_length, batches_by_prefix, outlines
from biasunlearn_trainer.models import evaluating, image_token_id, tokenizer_of
from biasunlearn_trainer.shared_prefixes import (
    SharedOutput,
    cannot_share,
    compare_with_plain,
    forward_plain,
    forward_shared,
    longest_shared,
)
from biasunlearn_trainer.streams import dealt

logger = logging.getLogger(__name__)

# Tokens of one forward pass of `score_tokens`: the float32 logits of 150,000 words then take 4.9 GB.
TOKENS_AT_ONCE = 8192
# What a tokenizer's `model_max_length` says where its length is not known (1e30) is no length.
LONGEST_CONTEXT = 10_000_000
# How many rows are scored both with and without shared prefixes before the others are scored with them.
COMPARED_ROWS = 3


@dataclass(frozen=True)
class CompletionScore:
    """What a model makes of one completion.

    Attributes:
        logp: log pi(y | x) in nats, the sum over the completion's tokens.
        num_tokens: number of those tokens, EOS included where it was appended.
        is_greedy: whether every token is the model's first choice: greedy decoding would give this completion.
        predicted: ids of the model's first choices along the completion, one per token.
    """

    logp: float
    num_tokens: int
    is_greedy: bool
    predicted: tuple[int, ...]

    @property
    def mean_log2(self) -> float:
        """Mean over tokens of log2 p, in bits: StereoSet's sentence score."""
        return self.logp / self.num_tokens / math.log(2)


class Scorer:
    """Scores completions and generates answers, in evaluation mode and without gradients.

    Args:
        model: a causal or image-text model, also wrapped for data parallelism, on the device where it is to run.
        processing_class: its tokenizer, or its processor where rows carry images.
        batch_size: rows of one forward pass.
        append_eos: score an EOS at the end of plain-text completions, unless a call says otherwise.
        share_prefixes: compute once what rows of a batch begin with, pictures included. The first rows of a kind (with
            pictures, without) are scored in both ways; where a model does not give the same, all go one by one.

    Attributes:
        num_tokens: how many tokens went through the language model in this process, padding included; those of
            `generate` are not counted.
        why_apart: of rows with (True) and without (False) pictures, why their prefixes are not shared; None where they
            are. A kind that was not met yet is not in here.

    With several processes every process must make the same calls with the same rows; all get all results.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        batch_size: int = 64,
        append_eos: bool = True,
        share_prefixes: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = extract_model_from_parallel(model)
        self.processing_class = processing_class
        self.tokenizer = tokenizer_of(processing_class)
        self.batch_size = batch_size
        self.append_eos = append_eos
        self.share_prefixes = share_prefixes
        self.num_tokens = 0
        self.why_apart: dict[bool, str | None] = {}
        self._image_token_id = image_token_id(processing_class)

    @property
    def context_length(self) -> int | None:
        """How many tokens the model takes: its configuration's, or else its tokenizer's; None where neither says."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(length := getattr(config, name, None), int) and length > 0:
                return length
        length = self.tokenizer.model_max_length
        return length if length and length < LONGEST_CONTEXT else None

    def score(
        self,
        rows: Sequence[Row],
        desc: str | None = None,
        append_eos: bool | None = None,
        max_length: int | None = None,
    ) -> list[CompletionScore]:
        """Score the completion of every row.

        Args:
            rows: with `prompt`, `completion` and, where there are pictures, `images`.
            desc: title of a progress bar on the main process; None shows none.
            append_eos: overrides the scorer's own setting.
            max_length: longest row in tokens; of a longer one the start of its prompt is cut, with a warning. None
                keeps everything.

        Returns:
            One score per row, in the order of the rows.

        Raises:
            ValueError: where the model gives NaN or infinite log-probabilities, as one that diverged does.
        """
        append_eos = self.append_eos if append_eos is None else append_eos
        collator = CompletionCollator(self.processing_class, max_length, append_eos)
        scores = self._over_batches(
            rows, lambda batch: self._scores(self._forward(collator, batch)), desc, collator=collator
        )
        _check_finite(scores, lambda index: rows[index]["completion"])
        return scores

    def score_tokens(self, rows: Sequence[Row], desc: str | None = None) -> list[CompletionScore]:
        """Score pieces of a text that was tokenised as a whole: tokenised apart, the pieces would have other tokens.

        Args:
            rows: with `prompt_ids`, the ids of at least one token that stands before, and `completion_ids`, those of
                the tokens to score.
            desc: title of a progress bar on the main process; None shows none.

        Returns:
            One score per row, in the order of the rows; nothing is added to the ids.

        Raises:
            ValueError: where a row has no token before or none to score, or the model gives NaN or infinite
                log-probabilities.
        """
        empty = [i for i, row in enumerate(rows) if not (row["prompt_ids"] and row["completion_ids"])]
        if empty:
            raise ValueError(
                f"Row {empty[0]} has {len(rows[empty[0]]['prompt_ids'])} tokens before and "
                f"{len(rows[empty[0]]['completion_ids'])} to score; both need at least one."
            )
        longest = max((_num_ids(row) for row in rows), default=1)
        at_once = max(1, min(self.batch_size, TOKENS_AT_ONCE // longest))
        scores = self._over_batches(
            rows, lambda batch: self._scores(self._forward_plain(self._pad_ids(batch))), desc, at_once
        )
        _check_finite(scores, lambda index: self.tokenizer.decode(rows[index]["completion_ids"]))
        return scores

    def score_last_token(
        self, rows: Sequence[Row], choices: Sequence[Sequence[str]], desc: str | None = None
    ) -> list[list[float]]:
        """Score completions of a row that differ in their last token alone, all in one forward pass a row.

        Args:
            rows: plain text with `prompt` and, where there are pictures, `images`; a `completion` is not looked at.
            choices: the completions of each row; no EOS is put behind them.
            desc: title of a progress bar on the main process; None shows none.

        Returns:
            For every row, in nats, log pi(last token | what stands before it) of each of its choices.

        Raises:
            ValueError: where choices of a row differ in more than their last token, or the model gives NaN or infinite
                log-probabilities.
        """
        last_ids = self._last_ids(choices)
        collator = CompletionCollator(self.processing_class, append_eos=False)
        asked = [
            {**row, "completion": several[0], "last_ids": ids}
            for row, several, ids in zip(rows, choices, last_ids, strict=True)
        ]
        logps = self._over_batches(
            asked, lambda batch: self._last_logps(self._forward(collator, batch), batch), desc, collator=collator
        )
        if broken := [i for i, values in enumerate(logps) if not all(map(math.isfinite, values))]:
            raise _not_finite(len(broken), len(rows), broken[0], choices[broken[0]][0])
        return logps

    def _last_ids(self, choices: Sequence[Sequence[str]]) -> list[list[int]]:
        """The last token of each choice, after checking that the tokens before it are the same within a row."""
        texts = list(dict.fromkeys(text for several in choices for text in several))
        ids = dict(zip(texts, self.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        for several in choices:
            if len({tuple(ids[text][:-1]) for text in several}) != 1 or not all(ids[text] for text in several):
                raise ValueError(
                    f"Choices must be the same but for one last token, got {list(several)[:4]}, in tokens "
                    f"{[ids[text] for text in several][:4]}. Score such completions one by one."
                )
        return [[ids[text][-1] for text in several] for several in choices]

    @staticmethod
    def _last_logps(output: SharedOutput, rows: Sequence[Row]) -> list[list[float]]:
        last = output.places[torch.tensor(output.counts, device=output.places.device).cumsum(0) - 1]
        logps = output.logits[last].float().log_softmax(-1).cpu()
        return [row_logps[row["last_ids"]].tolist() for row_logps, row in zip(logps, rows, strict=True)]

    def top_choices(
        self, rows: Sequence[Row], k: int, desc: str | None = None, append_eos: bool | None = None
    ) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]]:
        """The model's likeliest words along the completion of every row.

        Args:
            rows: as for `score`.
            k: how many words of each distribution; all of a smaller vocabulary.
            desc: title of a progress bar on the main process; None shows none.
            append_eos: overrides the scorer's own setting.

        Returns:
            For every row, of each token of its completion, the ids of the k likeliest words and their log p in nats,
            the likeliest first.

        Raises:
            ValueError: where the model gives NaN log-probabilities.
        """
        collator = CompletionCollator(
            self.processing_class, append_eos=self.append_eos if append_eos is None else append_eos
        )
        found = self._over_batches(
            rows, lambda batch: self._top(self._forward(collator, batch), k), desc, collator=collator
        )
        broken = [i for i, tokens in enumerate(found) if any(math.isnan(p) for _, logps in tokens for p in logps)]
        if broken:
            raise _not_finite(len(broken), len(rows), broken[0], rows[broken[0]]["completion"])
        return found

    @staticmethod
    def _top(output: SharedOutput, k: int) -> list[list[tuple[tuple[int, ...], tuple[float, ...]]]]:
        logps = output.logits.float().log_softmax(-1)
        top = logps.topk(min(k, logps.shape[-1]))
        predicted = [(tuple(i), tuple(p)) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        return [[predicted[place] for place in part.tolist()] for part in output.places.split(output.counts)]

    def generate(self, rows: Sequence[Row], max_new_tokens: int = 16, desc: str | None = None) -> list[str]:
        """Answer every row's prompt by greedy decoding.

        Args:
            rows: with `prompt` and, where there are pictures, `images`; a `completion` is not looked at.
            max_new_tokens: longest answer in tokens.
            desc: title of a progress bar on the main process; None shows none.

        Returns:
            The new text of every row, without special tokens, in the order of the rows.
        """
        collator = CompletionCollator(self.processing_class)
        return self._over_batches(rows, lambda batch: self._generate_batch(collator, batch, max_new_tokens), desc)

    def _over_batches(
        self,
        rows: Sequence[Row],
        work: Callable[[list[Row]], list],
        desc: str | None,
        batch_size: int | None = None,
        collator: CompletionCollator | None = None,
    ) -> list:
        """Deal the batches, and give every process the results of all rows; a collator, where prefixes are shared."""
        state = PartialState()
        done: list[tuple[int, Any]] = []
        bar = tqdm(total=len(rows), desc=desc, leave=False, disable=desc is None or not state.is_main_process)
        with evaluating(self.model), bar:
            for batches in self._batches(rows, batch_size or self.batch_size, collator):
                for batch, counts in dealt(batches, state.process_index, state.num_processes):
                    outputs = work([rows[index] for index in batch])
                    done += zip(batch, outputs, strict=True) if counts else ()
                    bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
        results = dict(gather_object(done))
        return [results[index] for index in range(len(rows))]

    def _batches(
        self, rows: Sequence[Row], batch_size: int, collator: CompletionCollator | None
    ) -> Iterator[list[list[int]]]:
        """Row numbers by batch, rows with pictures apart from those without."""
        all_rows = outlines(rows, with_prefixes=self.share_prefixes and collator is not None)
        for pictured in (True, False):
            members = [row for row in all_rows if row.pictured == pictured]
            if self.share_prefixes and collator is not None and self._can_share(rows, members, collator):
                yield batches_by_prefix(members, batch_size)
            else:
                yield batches_by_length(members, batch_size)

    def _can_share(self, rows: Sequence[Row], members: list[Outline], collator: CompletionCollator) -> bool:
        """Whether rows of a kind may share what they begin with, tried by all processes on the same rows of the kind.

        Two rows at least are needed to tell.
        """
        if len(members) < 2:
            return False
        pictured = members[0].pictured
        if pictured not in self.why_apart:
            why = cannot_share(self.model)
            if why is None:
                few = [batch for batch in batches_by_prefix(members, COMPARED_ROWS) if len(batch) > 1]
                batch = self._collate(collator, [rows[i] for i in few[-1]])
                if batch["input_ids"].shape[1] > longest_shared(self.model):
                    return False
                why = compare_with_plain(self.model, batch, self._image_token_id)
            why = next((each for each in gather_object([why]) if each is not None), None)
            if why is not None:
                kind = "with" if pictured else "without"
                logger.info("Rows %s pictures share no prefixes with %s: %s.", kind, type(self.model).__name__, why)
            self.why_apart[pictured] = why
        return self.why_apart[pictured] is None

    @staticmethod
    def _collate(collator: CompletionCollator, rows: Sequence[Row]) -> dict[str, Any]:
        return {**collator(rows), "num_images": torch.tensor([len(row.get("images") or []) for row in rows])}

    def _forward(self, collator: CompletionCollator, rows: list[Row]) -> SharedOutput:
        """The completions of a batch, with shared prefixes where rows of its kind may have them."""
        batch = self._collate(collator, rows)
        apart = self.why_apart.get(bool(batch["num_images"].any()), "not met")
        if not self.share_prefixes or apart or batch["input_ids"].shape[1] > longest_shared(self.model):
            return self._forward_plain(batch)
        output = forward_shared(self.model, batch, self._image_token_id)
        self.num_tokens += output.num_tokens
        return output

    def _forward_plain(self, batch: dict[str, Any]) -> SharedOutput:
        output = forward_plain(self.model, self._on_device(batch))
        self.num_tokens += output.num_tokens
        return output

    def _pad_ids(self, rows: list[Row]) -> dict[str, Tensor]:
        """Token ids as a right-padded batch, in the form of `CompletionCollator`'s."""
        width = max(map(_num_ids, rows))
        batch = {
            "input_ids": torch.full((len(rows), width), self.tokenizer.pad_token_id or 0),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
            "completion_mask": torch.zeros((len(rows), width), dtype=torch.bool),
        }
        for i, row in enumerate(rows):
            start, end = len(row["prompt_ids"]), _num_ids(row)
            batch["input_ids"][i, :end] = torch.tensor([*row["prompt_ids"], *row["completion_ids"]])
            batch["attention_mask"][i, :end] = 1
            batch["completion_mask"][i, start:end] = True
        return batch

    @staticmethod
    def _scores(output: SharedOutput) -> list[CompletionScore]:
        predicted = output.first_choices
        logps = [float(part.sum()) for part in output.token_logps.double().cpu().split(output.counts)]
        greedy = [bool(part.all()) for part in (predicted == output.targets).cpu().split(output.counts)]
        choices = [tuple(part.tolist()) for part in predicted.cpu().split(output.counts)]
        return [CompletionScore(*fields) for fields in zip(logps, output.counts, greedy, choices, strict=True)]

    def _generate_batch(self, collator: CompletionCollator, rows: list[Row], max_new_tokens: int) -> list[str]:
        empty = [{**row, "completion": "" if isinstance(row["prompt"], str) else []} for row in rows]
        batch = self._on_device(collator.prompt_batch(empty))
        width = batch["input_ids"].shape[1]
        generated = generating_model(self.model, batch).generate(
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._eos_token_ids(),
        )
        return self.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)

    def _eos_token_ids(self) -> list[int] | None:
        """Where to stop: at the model's own ends of text, and at the EOS that completions are trained to end with."""
        own = self.model.generation_config.eos_token_id
        ids = {*(own if isinstance(own, list | tuple) else [own]), self.tokenizer.eos_token_id} - {None}
        return sorted(ids) or None

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _num_ids(row: Row) -> int:
    return len(row["prompt_ids"]) + len(row["completion_ids"])


def _check_finite(scores: Sequence[CompletionScore], text_of: Callable[[int], Any]) -> None:
    """Raise a ValueError that shows the first of the rows whose log-probability is NaN or infinite."""
    broken = [index for index, score in enumerate(scores) if not math.isfinite(score.logp)]
    if broken:
        raise _not_finite(len(broken), len(scores), broken[0], text_of(broken[0]))


def _not_finite(num_broken: int, num_rows: int, first: int, text: Any) -> ValueError:
    return ValueError(
        f"The model gives no finite log-probability for {num_broken} of {num_rows} rows, the first of them row {first} "
        f"({text!r:.80}). Its weights have probably diverged: train with a lower learning rate or for fewer steps."
    )
