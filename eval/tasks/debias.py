"""The debiasing benchmark: reliability, generality and locality of a model before and after unlearning.

Rows are those of `data_builders.debias_benchmark`; `path` is a built set (its splits `ic_report` and `vqa_report`), or
a file of rows. A pair's `completion` is the unbiased sentence, `rejected` the biased one.

Source: "Debiasing Multimodal Large Language Models via Model Editing", sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pyarrow.compute import list_value_length

from biasunlearn_trainer.data_builders.debias_benchmark import BOTH, KINDS, LOCALITY_KINDS, PAIR_KINDS
from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows, StoredPicture, picture_table
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.metrics import Choices, locality_scores, share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly, matching_baseline, plain_text

# Words kept of each distribution: at the answers of NQ-open they hold nearly all of it.
NUM_CHOICES = 50
# k of the protocols, the published ones: EasyEdit compares the first word for text, the first ten for pictures.
OVERLAP_K = 10
POSITIONAL_K = {"t_locality": 1, "m_locality": 10}


class DebiasTask(Task):
    """`reliability`, `t_generality`, `v_generality`, by bias type, too; `t_locality`, `m_locality` with a baseline.

    Attributes:
        asked_for: whose rows are measured, those of `ic` or of `vqa`.
    """

    asked_for: ClassVar[str]
    append_eos: ClassVar[bool | None] = False

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the rows of this task, cut evenly over kinds and bias types."""
        dataset = load_rows(_file(path, f"{self.asked_for}_report"), check_images=False)
        columns = [column for column in dataset.column_names if column != "images"]
        texts = dataset.select_columns(columns).with_format("arrow")[:].to_pylist()
        wanted = [i for i, row in enumerate(texts) if self._is_asked(row)]
        _check([texts[i] for i in wanted], path, self.asked_for)
        groups = [(texts[i]["kind"], texts[i].get("bias_type")) for i in wanted]
        chosen = [wanted[place] for place in draw_evenly(groups, limit, self.name)]
        has_pictures = "images" in dataset.column_names
        table = picture_table(dataset, "images") if has_pictures else None
        counts = list_value_length(table[:].column(0)).to_pylist() if has_pictures else [0] * len(texts)
        self._texts = [texts[i] for i in chosen]
        self._pictures = [StoredPicture(table, i) if counts[i] else None for i in chosen]
        return PicturedRows(self._texts, self._pictures)

    def _is_asked(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is measured here: rows to forget, whose completion is the biased sentence, are not."""
        return row.get("task") in (None, BOTH, self.asked_for) and row.get("polarity") != "stereotype"

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Score both sentences of every pair, and take the likeliest words along the answers of the other rows."""
        pairs = [i for i, row in enumerate(self._texts) if row["kind"] in PAIR_KINDS]
        asked = [self._texts[i] for i in pairs] + [
            {**self._texts[i], "completion": self._texts[i]["rejected"]} for i in pairs
        ]
        pictures = [self._pictures[i] for i in pairs] * 2
        scores = scorer.score(PicturedRows(asked, pictures), desc=self.name, append_eos=self.append_eos)
        others = [i for i, row in enumerate(self._texts) if row["kind"] in LOCALITY_KINDS]
        rows = PicturedRows([self._texts[i] for i in others], [self._pictures[i] for i in others])
        choices = scorer.top_choices(rows, NUM_CHOICES, desc=f"{self.name} locality", append_eos=self.append_eos)
        items = [
            self._pair_item(i, less.logp, more.logp)
            for i, less, more in zip(pairs, scores[: len(pairs)], scores[len(pairs) :], strict=True)
        ]
        items += [self._locality_item(i, several) for i, several in zip(others, choices, strict=True)]
        return sorted(items, key=lambda item: item["index"])

    def _item(self, index: int) -> Item:
        row = self._texts[index]
        known = {name: row.get(name) for name in ("kind", "bias_type", "source", "source_id")}
        texts = {"prompt": plain_text(row["prompt"]), "expected": plain_text(row["completion"])}
        return {"index": index, **known, **texts, "rejected": plain_text(row.get("rejected"))}

    def _pair_item(self, index: int, logp_less: float, logp_more: float) -> Item:
        item = self._item(index)
        is_unbiased = logp_more < logp_less
        answer = item["expected"] if is_unbiased else item["rejected"]
        logps = {"logp_completion": logp_less, "logp_rejected": logp_more}
        return {**item, "answer": answer, "correct": is_unbiased, **logps}

    def _locality_item(self, index: int, choices: Sequence[tuple[tuple[int, ...], tuple[float, ...]]]) -> Item:
        top = {
            "top_ids": [list(ids) for ids, _ in choices],
            "top_logps": [[round(p, 5) for p in ps] for _, ps in choices],
        }
        return {**self._item(index), "answer": None, "correct": None, **top}

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Shares of pairs, overall and by bias type; localities against the baseline."""
        metrics = _shares(items)
        others = [item for item in items if item["kind"] in LOCALITY_KINDS]
        if baseline is not None and others:
            before = matching_baseline(others, baseline, self.name)
            for kind in LOCALITY_KINDS:
                pairs = [pair for pair in zip(before, others, strict=True) if pair[1]["kind"] == kind]
                if pairs:
                    metrics |= _locality(pairs, kind)
        types = sorted({item["bias_type"] for item in items if item["bias_type"] and item["kind"] in PAIR_KINDS})
        return TaskResult(metrics, {b: _shares([i for i in items if i["bias_type"] == b]) for b in types})


class DebiasICTask(DebiasTask):
    """Captioning."""

    asked_for = "ic"


class DebiasVQATask(DebiasTask):
    """Questions about pictures."""

    asked_for = "vqa"


def _shares(items: Sequence[Item]) -> dict[str, MetricValue]:
    flags = {kind: [item["correct"] for item in items if item["kind"] == kind] for kind in PAIR_KINDS}
    return {kind: share(several) for kind, several in flags.items() if several}


def _locality(pairs: Sequence[tuple[Item, Item]], kind: str) -> dict[str, MetricValue]:
    before, after = ([_answer(item) for item in side] for side in zip(*pairs, strict=True))
    fewest = min(len(token.ids) for answer in (*before, *after) for token in answer)
    # A vocabulary may have fewer words than k.
    return locality_scores(before, after, kind, k=min(OVERLAP_K, fewest), positional_k=min(POSITIONAL_K[kind], fewest))


def _answer(item: Item) -> list[Choices]:
    return [Choices(tuple(ids), tuple(logps)) for ids, logps in zip(item["top_ids"], item["top_logps"], strict=True)]


def _file(path: str, split: str) -> str:
    """The split of a built set, or the path itself."""
    folder = Path(path).expanduser()
    for file in (folder / "data" / f"{split}.parquet", folder / f"{split}.parquet"):
        if file.is_file():
            return str(file)
    if (folder / "data").is_dir():
        there = ", ".join(sorted(file.stem for file in (folder / "data").glob("*.parquet"))) or "none"
        raise FileNotFoundError(f"{folder} has no split {split}; splits there: {there}. Was its source there?")
    return str(folder)


def _check(rows: Sequence[Mapping[str, Any]], path: str, task: str) -> None:
    faults = Faults(path)
    if not rows:
        faults.add(f"it has no rows of the task {task!r} (column `task`)")
    for number, row in enumerate(rows, start=1):
        kind = row.get("kind")
        if kind not in KINDS:
            meant = nearest(str(kind), KINDS)
            hint = f"did you mean {meant!r}? " if meant else ""
            faults.add(f"unknown kind {kind!r}; {hint}valid: {', '.join(KINDS)}", f"row {number} of the task")
        elif kind in PAIR_KINDS and not row.get("rejected"):
            faults.add(f"kind {kind!r} needs the biased sentence in `rejected`", f"row {number} of the task")
    faults.raise_if_any()
