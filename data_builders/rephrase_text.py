"""The stage that has a language model say prompts or completions in other words, and keeps only what passes the checks.

stages:
  - stage: rephrase_text
    model: Qwen/Qwen2.5-7B-Instruct
    base_url: http://localhost:8000/v1     # left out: the model is loaded here, from a path or the Hub
    api_key_env: OPENAI_API_KEY            # where the server wants a key: the variable that holds it
    kind: t_generality
"""

import re
import threading
from collections.abc import Sequence
from typing import Literal

from biasunlearn_trainer.data_builders.language_models import LocalModel, NoAnswer, RefusedRequest, ServedModel
from biasunlearn_trainer.data_builders.prompt_templates import read_templates, text_of, with_text
from biasunlearn_trainer.data_builders.rephrase_checks import MeaningCheck, fault_of
from biasunlearn_trainer.data_builders.stages import Outcome, StageError, row_key

MAX_FAILURES = 8
"""Requests in a row without an answer, each after all its retries, until the server is given up."""
# What models put around an answer: quotation marks, or a word that says what follows.
_WRAPPING = re.compile(
    r"^(?:(?:rewritten|rephrased)(?: text| question| sentence)?:\s*)?(.*)$", re.IGNORECASE | re.DOTALL
)


class RephraseText:
    """An item stage: one request a text, one `Outcome` a row.

    Args:
        model: the server's name of the model, or a path or Hub id.
        base_url: of an OpenAI-compatible server; None: the model is loaded in this process.
        api_key_env: the environment variable with the server's key; the key itself is stored nowhere.
        column: what is rephrased; of chat messages the last one.
        keep_prefix: how each text begins that must stay as it is ("Question: ").
        keep_suffix: how it ends (" Answer:").
        template: `rephrase`, or a YAML file with an instruction that holds {text}.
        terms: words that must stay, besides the demographic ones that are listed.
        kind: what the column `kind` becomes, for instance t_generality; None: it stays.
        keep_rows: let the row as it was through, too, before its rephrasing.
        meaning_model: a sentence-transformers model that checks the meaning; None: the other checks alone.
        min_similarity: of the two texts' embeddings, in -1..1. Default 0.75; look at the rejects to choose it.
        attempts: how often a text is asked for at most. One whose rephrasing a check refuses is asked for again: with
            the next template where there are several, the next seed, and at `retry_temperature`.
        temperature: of sampling, in the first attempt; 0 decodes greedily.
        retry_temperature: in the others. Greedy decoding would say the same again, so that it must be above 0.
        max_tokens: of an answer.
        seed: of sampling.
        concurrency: requests under way at a time; a local model takes batches instead.
        batch_size: texts that a local model gets at once.
        timeout: seconds for an answer.
        retries: of a request that timed out, or met 429 or 5xx.
        requests_per_minute: at most; None: no limit.
        device: of a local model; None: the first accelerator, else the CPU.

    Raises:
        ValueError: a value out of range, a template without its slot.

    The rephrased row has `original_prompt` (or `original_completion`) and `rephrased_by`.
    """

    name = "rephrase_text"

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        column: Literal["prompt", "completion"] = "prompt",
        keep_prefix: str = "",
        keep_suffix: str = "",
        template: str = "rephrase",
        terms: Sequence[str] = (),
        kind: str | None = None,
        keep_rows: bool = False,
        meaning_model: str | None = None,
        min_similarity: float = 0.75,
        attempts: int = 3,
        temperature: float = 0.0,
        retry_temperature: float = 0.7,
        max_tokens: int = 256,
        seed: int = 0,
        concurrency: int = 8,
        batch_size: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        requests_per_minute: float | None = None,
        device: str | None = None,
    ):
        _check_ranges(locals())
        self._templates = read_templates(template)
        self._column, self._prefix, self._suffix = column, keep_prefix, keep_suffix
        self._terms, self._kind, self.keep_rows = tuple(terms), kind, keep_rows
        self._model_name = model
        self.settings = {
            "model": model,
            "column": column,
            "keep_prefix": keep_prefix,
            "keep_suffix": keep_suffix,
            "template": self._templates.key,
            "terms": list(terms),
            "kind": kind,
            "meaning_model": meaning_model,
            "min_similarity": min_similarity if meaning_model else None,
            "temperature": temperature,
            "retry_temperature": retry_temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        self.max_attempts, self._temperatures, self._seed = attempts, (temperature, retry_temperature), seed
        self._meaning = MeaningCheck(meaning_model, min_similarity) if meaning_model else None
        if base_url is None:
            self.batch_size, self.concurrency = batch_size, 1
            self._asked = LocalModel(model, device, max_tokens)
        else:
            self.batch_size, self.concurrency = 1, concurrency
            limits = {"timeout": timeout, "retries": retries, "requests_per_minute": requests_per_minute}
            self._asked = ServedModel(model, base_url, api_key_env, max_tokens=max_tokens, **limits)
        self._failures, self._lock = 0, threading.Lock()

    def key(self, row: dict) -> str:
        """Rows that ask the same with the same answers are rephrased once, whatever their pictures."""
        return row_key(row, (self._column, "completion", "rejected", "target"))

    def do(self, rows: list[dict], attempt: int = 0) -> list[Outcome]:
        """Asks, and checks what comes back; another attempt asks in another way."""
        self._stop_if_given_up("as before")
        texts = [self._core(row) for row in rows]
        numbers = [int(self.key(row), 16) + attempt for row in rows]
        asked = [self._templates.fill(number, text) for number, text in zip(numbers, texts, strict=True)]
        try:
            answers = self._asked.ask(asked, self._temperatures[attempt > 0], self._seed + attempt)
        except RefusedRequest as err:
            return [Outcome(reason="refused by the server", detail=str(err)) for _ in rows]
        except NoAnswer as err:
            self._count_failure(err)
            return [Outcome(reason="no answer", detail=str(err), final=False) for _ in rows]
        with self._lock:
            self._failures = 0
        return [self._outcome(row, text, answer) for row, text, answer in zip(rows, texts, answers, strict=True)]

    def _count_failure(self, err: NoAnswer) -> None:
        with self._lock:
            self._failures += 1
        self._stop_if_given_up(str(err))

    def _stop_if_given_up(self, last: str) -> None:
        """Stops every thread: those that come later do not ask any more."""
        if self._failures >= MAX_FAILURES:
            raise StageError(
                f"the server gave no answer {MAX_FAILURES} times in a row, each after all retries (last: {last}). "
                "What was answered is stored; run the same command again when it is back."
            ) from None

    def _core(self, row: dict) -> str:
        text = text_of(row[self._column])
        return text.removeprefix(self._prefix).removesuffix(self._suffix).strip()

    def _outcome(self, row: dict, text: str, answer: str) -> Outcome:
        original = text_of(row[self._column])
        answer = _unwrapped(answer, text)
        kept = {column: row.get(column) for column in ("target", "completion", "rejected") if column != self._column}
        fault = fault_of(text, answer, kept, self._terms)
        if fault is None and self._meaning is not None:
            fault = self._meaning.fault_of(text, answer)
        if fault is not None:
            return Outcome(reason=fault[0], detail=fault[1], retry=True)
        at = original.index(text, len(self._prefix) if original.startswith(self._prefix) else 0)
        columns = {
            self._column: with_text(row[self._column], original[:at] + answer + original[at + len(text) :]),
            f"original_{self._column}": original,
            "rephrased_by": self._model_name,
        }
        return Outcome(columns | ({"kind": self._kind} if self._kind else {}))

    def close(self) -> None:
        """Closes connections, or lets the weights go."""
        self._asked.close()


def _unwrapped(answer: str, original: str) -> str:
    answer = _WRAPPING.match(answer.strip()).group(1).strip()
    for mark in ('"', "“”", "'"):
        quoted = len(answer) > 1 and answer[0] == mark[0] and answer[-1] == mark[-1]
        if quoted and not original.strip().startswith(mark[0]):
            answer = answer[1:-1].strip()
    return answer


def _check_ranges(given: dict) -> None:
    faults = []
    for name in ("attempts", "concurrency", "batch_size", "max_tokens"):
        if given[name] < 1:
            faults.append(f"`{name}` must be 1 or more, got {given[name]}")
    for name in ("timeout", "requests_per_minute", "retry_temperature"):
        if given[name] is not None and not 0 < given[name] < float("inf"):
            faults.append(f"`{name}` must be above 0, got {given[name]}")
    for name in ("retries", "temperature"):
        if given[name] < 0:
            faults.append(f"`{name}` must not be negative, got {given[name]}")
    if not -1 <= given["min_similarity"] <= 1:
        faults.append(f"`min_similarity` must be in -1..1, got {given['min_similarity']}")
    if faults:
        raise ValueError("\n".join(faults))
