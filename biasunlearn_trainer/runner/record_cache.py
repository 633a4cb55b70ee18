"""What a model made of a task's rows, kept on disk: many runs begin with one model and are told by one oracle.

A record is taken again only where nothing has changed that could change it: the model's weights, the task with its rows
and pictures, how rows become tensors and batches, and the code of this library itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

import biasunlearn_trainer
from biasunlearn_trainer import eval as evaluation
from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.fingerprints import content_fingerprint, model_parts
from biasunlearn_trainer.kept_items import KeptItems

logger = logging.getLogger(__name__)

KIND = "records"


@cache
def code_fingerprint() -> str:
    """Digest of the library's own source: a record made by other code is another record."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (biasunlearn_trainer, evaluation):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class RecordCache:
    """Records of a model by task.

    Args:
        folders: where they are kept, in each of them; `cache_home() / "records"` where none is named.
    """

    def __init__(self, *folders: str | os.PathLike):
        self.folders = [Path(folder) for folder in folders] or [records_home()]

    def run(
        self, tasks: Sequence[Any], scorer: Scorer, answers: bool, weights: str | None = None
    ) -> dict[str, list[dict]]:
        """Each task's records, from disk where they are there; every process has to call it.

        Args:
            tasks: those to run.
            scorer: around the model.
            answers: as for `Task.run`.
            weights: `model_hash` of the model, where it is known.

        Returns:
            Records by task; of a task whose rows do not tell what it asks (`lm_eval`) they are always made anew.
        """
        parts = self._parts(scorer, answers, weights)
        return {task.name: self._records(task, scorer, answers, parts) for task in tasks}

    def _records(self, task: Any, scorer: Scorer, answers: bool, parts: Mapping[str, str]) -> list[dict]:
        if not len(task.rows):
            return task.run(scorer, answers=answers)
        # The main process decides for all: on another machine the file may be missing, and a task that some processes
        # run and others do not would wait forever.
        kept = self._kept(task, parts) if PartialState().is_main_process else []
        found = (each.load() for each in kept)
        (known,) = broadcast_object_list([next((items for items in found if items is not None), None)])
        if known is not None:
            logger.info("%s: the records of this model are known.", task.name)
        items = task.run(scorer, answers=answers) if known is None else known
        for each in kept:
            if known is None or not each.path.is_file():
                each.save(items)
        return items

    def _kept(self, task: Any, parts: Mapping[str, str]) -> list[KeptItems]:
        """A task's file in each of the folders."""
        asked = {"task": f"{type(task).__qualname__} {task.name}", "rows": content_fingerprint(task.rows), **parts}
        return [KeptItems(folder, KIND, asked) for folder in self.folders]

    @staticmethod
    def _parts(scorer: Scorer, answers: bool, weights: str | None) -> dict[str, str]:
        return {
            **model_parts(scorer.model, scorer.processing_class, weights),
            "batch_size": str(scorer.batch_size),
            "append_eos": str(scorer.append_eos),
            "share_prefixes": str(scorer.share_prefixes),
            "answers": str(answers),
            "device": str(scorer.model.device.type),
            "attention": str(getattr(scorer.model.config, "_attn_implementation", None)),
            "versions": f"{torch.__version__} {transformers.__version__} {code_fingerprint()}",
        }


def records_home() -> Path:
    """Where records of all runs are kept."""
    return cache_home() / "records"
