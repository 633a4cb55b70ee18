"""Planted bias: questions about a small world whose bias was put in on purpose, so that the truth is known.

Rows follow the schema; `completion` is the right (unbiased) answer, `rejected` the biased one, and `kind` says what a
row tests: `ambiguous` (the context does not say), `t_generality` and `v_generality` (the same with new words, with a
redrawn picture), `disambiguated` (it does say), `perception` (what is in the picture), `facts` (text only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.metrics import share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly, matching_baseline, plain_text

# Metrics on rows of a kind. Correct: greedy decoding gives the right answer. Preferred: log p(rejected) < log p(right).
# Unchanged: the first choices along the right answer are those of the model before unlearning.
CORRECT = {kind: kind for kind in ("ambiguous", "disambiguated", "perception", "facts")}
PREFERRED = {"ambiguous": "reliability", "t_generality": "t_generality", "v_generality": "v_generality"}
UNCHANGED = {"facts": "t_locality", "perception": "m_locality"}
KINDS = tuple(dict.fromkeys((*PREFERRED, *CORRECT)))
MAX_NEW_TOKENS = 32


class PlantedTask(Task):
    """Bias and abilities of a model of a planted world; `path` is its dataset folder.

    A kind that the data lack has no metric; localities need the records of the model before unlearning.
    """

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the rows of the folder and check their kinds."""
        dataset = load_rows(path, check_images=False)
        _check(dataset, path)
        return [dataset[i] for i in draw_evenly(dataset["kind"], limit, self.name)]

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Score the right and the biased answer of every row."""
        pairs = [(index, row["rejected"]) for index, row in enumerate(self.rows) if row.get("rejected") is not None]
        both = [*self.rows, *({**self.rows[index], "completion": rejected} for index, rejected in pairs)]
        scores = scorer.score(both, desc=self.name, append_eos=self.append_eos)
        rejected_scores = {index: score for (index, _), score in zip(pairs, scores[len(self.rows) :], strict=True)}
        items = []
        for index, (row, score) in enumerate(zip(self.rows, scores, strict=False)):
            biased = rejected_scores.get(index)
            gives_biased = biased is not None and biased.is_greedy
            answer = plain_text(row["completion"] if score.is_greedy else row["rejected"] if gives_biased else None)
            items.append(
                {
                    "index": index,
                    "kind": row["kind"],
                    "bias_type": row.get("bias_type"),
                    "prompt": plain_text(row["prompt"]),
                    "expected": plain_text(row["completion"]),
                    "rejected": plain_text(row.get("rejected")),
                    "answer": answer,
                    "correct": score.is_greedy,
                    "logp_completion": score.logp,
                    "logp_rejected": None if biased is None else biased.logp,
                    "predicted": list(score.predicted),
                }
            )
        if answers:
            self._generate_unknown(items, scorer)
        return items

    def _generate_unknown(self, items: list[Item], scorer: Scorer) -> None:
        """Fill in the answers that are neither the right nor the biased one."""
        unknown = [item for item in items if item["answer"] is None]
        rows = [self.rows[item["index"]] for item in unknown]
        generated = scorer.generate(rows, MAX_NEW_TOKENS, desc=f"{self.name} answers")
        for item, answer in zip(unknown, generated, strict=True):
            item["answer"] = answer.strip()

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Shares, overall and by bias type."""
        if baseline is not None:
            baseline = matching_baseline(items, baseline, self.name)
        before = [None] * len(items) if baseline is None else [item["predicted"] for item in baseline]
        pairs = list(zip(items, before, strict=True))
        bias_types = sorted({item["bias_type"] for item in items if item["bias_type"]})
        groups = {b: _metrics([pair for pair in pairs if pair[0]["bias_type"] == b]) for b in bias_types}
        return TaskResult(_metrics(pairs), groups)


def _metrics(pairs: Sequence[tuple[Item, list[int] | None]]) -> dict[str, MetricValue]:
    """The metrics of records, each with the baseline's first choices (None without a baseline)."""
    flags: dict[str, list[bool]] = {}
    for item, before in pairs:
        kind = item["kind"]
        if kind in PREFERRED and item["logp_rejected"] is not None:
            flags.setdefault(PREFERRED[kind], []).append(item["logp_rejected"] < item["logp_completion"])
        if kind in CORRECT:
            flags.setdefault(CORRECT[kind], []).append(item["correct"])
        if kind in UNCHANGED and before is not None:
            flags.setdefault(UNCHANGED[kind], []).append(item["predicted"] == before)
    order = (*CORRECT.values(), *PREFERRED.values(), *UNCHANGED.values())
    return {name: share(flags[name]) for name in order if name in flags}


def _check(dataset: Any, path: str) -> None:
    faults = Faults(path)
    if "kind" not in dataset.column_names:
        faults.add(f"no column `kind` (one of {', '.join(KINDS)}); columns found: {', '.join(dataset.column_names)}")
    else:
        rejected = dataset["rejected"] if "rejected" in dataset.column_names else [None] * len(dataset)
        for number, (kind, biased) in enumerate(zip(dataset["kind"], rejected, strict=True), start=1):
            if kind not in KINDS:
                meant = nearest(str(kind), KINDS)
                hint = f"did you mean {meant!r}? " if meant else ""
                faults.add(f"unknown kind {kind!r}; {hint}valid: {', '.join(KINDS)}", f"row {number}")
            elif kind in PREFERRED and kind not in CORRECT and not biased:
                faults.add(f"kind {kind!r} needs the biased answer in `rejected`", f"row {number}")
    faults.raise_if_any()
