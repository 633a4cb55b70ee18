"""What a model made of a task's rows, kept on disk: many runs begin with one model and are told by one oracle.

A record is taken again only where nothing has changed that could change it: the model's weights, the task with its rows
and pictures, how rows become tensors and batches, and the code of this library itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
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
from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.fingerprints import content_fingerprint, model_hash, processor_fingerprint

logger = logging.getLogger(__name__)


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

    def run(self, tasks: Sequence[Any], scorer: Scorer, answers: bool) -> dict[str, list[dict]]:
        """Each task's records, from disk where they are there; every process has to call it.

        Args:
            tasks: those to run.
            scorer: around the model.
            answers: as for `Task.run`.

        Returns:
            Records by task; of a task whose rows do not tell what it asks (`lm_eval`) they are always made anew.
        """
        model = self._key_of(scorer, answers)
        return {task.name: self._records(task, scorer, answers, model) for task in tasks}

    def _records(self, task: Any, scorer: Scorer, answers: bool, model: str) -> list[dict]:
        if not len(task.rows):
            return task.run(scorer, answers=answers)
        # The main process decides for all: on another machine the file may be missing, and a task that some processes
        # run and others do not would wait forever.
        paths = self._paths(task, model) if PartialState().is_main_process else []
        (known,) = broadcast_object_list([_read_any(paths)])
        if known is not None:
            logger.info("%s: the records of this model are known.", task.name)
        items = task.run(scorer, answers=answers) if known is None else known
        for path in paths:
            if not path.is_file():
                write_text(path, json.dumps(items))
        return items

    def _paths(self, task: Any, model: str) -> list[Path]:
        """A task's file in each of the folders."""
        said = f"{model} {type(task).__qualname__} {task.name} {content_fingerprint(task.rows)}"
        name = f"{hashlib.blake2b(said.encode(), digest_size=12).hexdigest()}.json"
        return [folder / name for folder in self.folders]

    @staticmethod
    def _key_of(scorer: Scorer, answers: bool) -> str:
        parts = {
            "model": model_hash(scorer.model),
            "processor": processor_fingerprint(scorer.processing_class),
            "batch": scorer.batch_size,
            "append_eos": scorer.append_eos,
            "share_prefixes": scorer.share_prefixes,
            "answers": answers,
            "device": str(scorer.model.device.type),
            "attention": getattr(scorer.model.config, "_attn_implementation", None),
            "versions": [torch.__version__, transformers.__version__, code_fingerprint()],
        }
        return json.dumps(parts)


def records_home() -> Path:
    """Where records of all runs are kept."""
    return cache_home() / "records"


def _read_any(paths: Sequence[Path]) -> list[dict] | None:
    """What the first of the files that is there holds."""
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))
