"""Scores and answers of a model: the only file of the evaluation, with `passes`, that touches one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import generating_model
from biasunlearn_trainer.eval.batches import Row
from biasunlearn_trainer.eval.passes import Passes
from biasunlearn_trainer.shared_prefixes import SharedOutput

# Tokens of one forward pass of `score_tokens`: the float32 logits of 150,000 words then take 4.9 GB.
TOKENS_AT_ONCE = 8192
# What a tokenizer's `model_max_length` says where its length is not known (1e30) is no length.
LONGEST_CONTEXT = 10_000_000


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


class Scorer(Passes):
    """Scores completions and generates answers, in evaluation mode and without gradients.

    Args:
        model: a causal or image-text model, also wrapped for data parallelism, on the device where it is to run.
        processing_class: its tokenizer, or its processor where rows carry images.
        batch_size: rows of one forward pass.
        append_eos: score an EOS at the end of plain-text completions, unless a call says otherwise.
        share_prefixes: as for `Passes`, which also tells how many tokens went through the model.

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
        super().__init__(model, processing_class, batch_size, share_prefixes)
        self.append_eos = append_eos

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
        scores = self.over_batches(
            rows, lambda batch: self._scores(self.forward(collator, batch)), desc, collator=collator
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
        scores = self.over_batches(
            rows, lambda batch: self._scores(self.forward_plain(self._pad_ids(batch))), desc, at_once
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
        logps = self.over_batches(
            asked, lambda batch: self._last_logps(self.forward(collator, batch), batch), desc, collator=collator
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
        found = self.over_batches(
            rows, lambda batch: self._top(self.forward(collator, batch), k), desc, collator=collator
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
        return self.over_batches(rows, lambda batch: self._generate_batch(collator, batch, max_new_tokens), desc)

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
        batch = self.on_device(collator.prompt_batch(empty))
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
