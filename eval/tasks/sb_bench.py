"""SB-Bench and image BBQ: BBQ's questions about a picture. Protocols and metrics are those of `eval.tasks.bbq`.

SB-Bench has ambiguous contexts alone, so that it gives `accuracy_ambiguous` and `s_amb`. Its authors report the share
of answers that match the right option, judged by another model; that share is `accuracy_ambiguous`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows
from biasunlearn_trainer.data_builders.sources.sb_bench import PicturedItem, read_image_bbq, read_sb_bench
from biasunlearn_trainer.eval.tasks.bbq import BBQGenerateTask, BBQLettersTask, BBQSumTask, BBQTask


class _Pictured:
    """Puts an item's picture into each of its rows."""

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the items and lay each out as rows."""
        rows = super().load_rows(path, limit)
        return PicturedRows(rows, [item.picture for item in self._items for _ in range(self.rows_per_item)])

    def read_items(self, path: str) -> Sequence[PicturedItem]:
        """Read a split of SB-Bench."""
        return read_sb_bench(path)


class SBBenchTask(_Pictured, BBQTask):
    """SB-Bench by the mean log p per token of an option."""


class SBBenchSumTask(_Pictured, BBQSumTask):
    """SB-Bench by the sum of log p of an option."""


class SBBenchLettersTask(_Pictured, BBQLettersTask):
    """SB-Bench by the letter of an option."""


class SBBenchGenerateTask(_Pictured, BBQGenerateTask):
    """SB-Bench by what the model writes."""


class ImageBBQTask(SBBenchTask):
    """BBQ's files with a column `image`, by the mean log p per token of an option."""

    def read_items(self, path: str) -> Sequence[PicturedItem]:
        """Read BBQ with pictures."""
        return read_image_bbq(path)


class ImageBBQLettersTask(SBBenchLettersTask):
    """The same by the letter of an option."""

    def read_items(self, path: str) -> Sequence[PicturedItem]:
        """Read BBQ with pictures."""
        return read_image_bbq(path)
