"""Made-up people: does the model still know those whom it should forget, and still know the others?

Rows follow the schema; `completion` is the answer, `choices` the words that its last word is chosen from, and `kind`
says who is asked about, and how: `forget_vqa` and `retain_vqa` ask for a fact by face, `forget_qa` and `retain_qa` by
name, `forget_who` and `retain_who` for the name of a face; `real_vqa` asks what is seen in a stranger's portrait and
`real_qa` for a plain fact.

An answer is a name and then a fact. The choice among the facts is made behind the words that the model itself begins
its answer with, whether they are the right name or not: a model that no longer knows a face says another name, and goes
on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.metrics import share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly, plain_text

# What is to be forgotten: what the picture tells. A name in words still has to lead to its facts (MMUnlearner, eq. 6).
FORGOTTEN = ("forget_vqa", "forget_who")
KINDS = ("forget_vqa", "forget_qa", "forget_who", "retain_vqa", "retain_qa", "retain_who", "real_vqa", "real_qa")
EXACT = "_exact"
# A name, a fact and an end are three tokens of the testbed; more are read so that an answer that goes on is seen to.
MAX_NEW_TOKENS = 6


class EntitiesTask(Task):
    """What a model knows of made-up people; `path` is the folder of a split's `validation` or `report`.

    For each kind of row, `KIND` is the share where the right last word is likelier than every other choice, and
    `KIND_exact` the share where greedy decoding gives the answer word for word.
    """

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the rows of the folder and check their kinds and choices."""
        dataset = load_rows(path, check_images=False)
        _check(dataset, path)
        return [dataset[i] for i in draw_evenly(dataset["kind"], limit, self.name)]

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Let the model answer, then score the choices behind its own first words; `answers` changes nothing."""
        said = scorer.generate(self.rows, MAX_NEW_TOKENS, desc=f"{self.name} answers")
        expected = [plain_text(row["completion"]) for row in self.rows]
        begun = [_beginning(text, len(right.split()) - 1) for text, right in zip(said, expected, strict=True)]
        choices = [[f"{words} {word}" for word in row["choices"]] for words, row in zip(begun, self.rows, strict=True)]
        logps = scorer.score_last_token(self.rows, choices, desc=self.name)
        parts = zip(self.rows, said, expected, logps, strict=True)
        return [_record(index, *each) for index, each in enumerate(parts)]

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """The two shares of each kind; nothing is compared with the baseline."""
        metrics: dict[str, MetricValue] = {}
        for suffix, field in (("", "correct"), (EXACT, "exact")):
            for kind in KINDS:
                asked = [item for item in items if item["kind"] == kind]
                if asked:
                    metrics[f"{kind}{suffix}"] = _share(kind, asked, field)
        return TaskResult(metrics)


def _beginning(text: str, num_words: int) -> str:
    """The first words of an answer, each with a space before it."""
    return "".join(f" {word}" for word in text.split()[:num_words])


def _record(index: int, row: Mapping[str, Any], said: str, expected: str, logps: Sequence[float]) -> Item:
    right = row["choices"].index(expected.split()[-1])
    to_forget = row["kind"] in FORGOTTEN
    return {
        "index": index,
        "kind": row["kind"],
        "bias_type": None,
        "prompt": plain_text(row["prompt"]),
        # Where the answer is to be forgotten no other one is expected in its place.
        "expected": None if to_forget else expected,
        "rejected": expected if to_forget else None,
        "answer": said.strip(),
        "exact": said.strip() == expected,
        "correct": all(logps[right] > logp for place, logp in enumerate(logps) if place != right),
        "chance": 1 / len(logps),
        "logp_completion": logps[right],
    }


def _share(kind: str, items: Sequence[Item], field: str) -> MetricValue:
    """A share of right answers: of what is to be forgotten lower is better, down to what a guess gives."""
    flags = [item[field] for item in items]
    if kind not in FORGOTTEN:
        return share(flags)
    chance = sum(item["chance"] for item in items) / len(items) if field == "correct" else 0.0
    return share(flags, ideal=chance, higher_is_better=False)


def _check(dataset: Any, path: str) -> None:
    faults = Faults(path)
    missing = [name for name in ("kind", "choices") if name not in dataset.column_names]
    for name in missing:
        faults.add(f"no column `{name}`; columns found: {', '.join(dataset.column_names)}")
    if not missing:
        columns = zip(dataset["kind"], dataset["completion"], dataset["choices"], strict=True)
        for number, (kind, completion, choices) in enumerate(columns, start=1):
            if kind not in KINDS:
                meant = nearest(str(kind), KINDS)
                hint = f"did you mean {meant!r}? " if meant else ""
                faults.add(f"unknown kind {kind!r}; {hint}valid: {', '.join(KINDS)}", f"row {number}")
            last = completion.split()[-1]
            if not choices or last not in choices or len(set(choices)) < max(2, len(choices)):
                faults.add(
                    f"`choices` must be at least two different words, {last!r} (the answer's last) among them; "
                    f"got {choices}",
                    f"row {number}",
                )
    faults.raise_if_any()
