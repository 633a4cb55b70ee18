"""Callbacks that watch a run: probes measure tasks during training; `guards` judges what they find.

A probe leaves no trace in the weights: train mode and every random state are put back, so that a run with probes ends
bit-identical with the same run without them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.stereoset import StereoSetTask
from biasunlearn_trainer.guards import PROBE
from biasunlearn_trainer.models import undisturbed

logger = logging.getLogger(__name__)


class ProbeCallback(TrainerCallback):
    """Measures tasks at step 0 and every so many optimizer steps, and logs them as `probe/TASK/METRIC`.

    The records go through `trainer.log`: they stand in `trainer.state.log_history`, reach every tracker and survive a
    resume.

    Args:
        trainer: the trainer whose model is measured and whose log is written.
        tasks: what `biasunlearn_trainer.eval.tasks.load_task` returns; a `limit` there keeps probes short.
        every: optimizer steps between two probes, at least 1.
        batch_size: rows scored at once on each process.
        share_prefixes: compute once what rows of a batch begin with.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        tasks: Sequence[Any],
        every: int = 10,
        batch_size: int = 64,
        share_prefixes: bool = True,
    ):
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every}. Use 10, or leave the probes out.")
        self.trainer = trainer
        self.tasks = list(tasks)
        self.every = every
        self.batch_size = batch_size
        self.share_prefixes = share_prefixes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Measures the model before its first step; a resumed run has that record already."""
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Measures every `every` steps, before a checkpoint of the same step is written."""
        if state.global_step % self.every:
            return
        try:
            self.measure()
        except ValueError as err:
            # The first probe passed, so it is the weights that cannot be measured any more.
            logger.warning("step %d: the probe failed, training stops here. %s", state.global_step, err)
            control.should_training_stop = True

    def measure(self) -> dict[str, float]:
        """Measures every task on the live model and logs the values.

        Returns:
            `probe/TASK/METRIC` -> value. Collective: every process has to call it.
        """
        model = self.trainer.model
        values: dict[str, float] = {}
        with undisturbed(model):
            scorer = Scorer(model, self.trainer.processing_class, self.batch_size, share_prefixes=self.share_prefixes)
            for task in self.tasks:
                result = task.summarise(task.run(scorer))
                values |= {f"{PROBE}{task.name}/{name}": metric.value for name, metric in result.metrics.items()}
        # Logging clears `should_log`, which is set already where this step's losses are to be logged too.
        should_log = self.trainer.control.should_log
        self.trainer.log(dict(values))
        self.trainer.control.should_log = should_log
        return values


class StereoSetProbe:
    """Measures SS and LMS of every bias type on a StereoSet task, for `BiasUnlearnTrainer`.

    Args:
        task: the probe split, a `StereoSetTask`.
        processing_class: the model's tokenizer.
        batch_size: sentences scored at once on each process.
        share_prefixes: compute once what sentences of a batch begin with.

    Raises:
        ValueError: for a task of another kind.
    """

    def __init__(self, task: Any, processing_class: Any, batch_size: int = 64, share_prefixes: bool = True):
        self.check(task)
        self.task, self.processing_class, self.batch_size = task, processing_class, batch_size
        self.share_prefixes = share_prefixes

    @staticmethod
    def check(task: Any) -> None:
        """Raises a ValueError for a task of another kind."""
        if not isinstance(task, StereoSetTask):
            raise ValueError(
                f"{task.name} has no stereotype score by bias type; a bias probe is a task `stereoset[@LABEL]=PATH`."
            )

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Returns `ss`, `lms` (percent, averaged over target terms) and `num_items` by bias type; collective."""
        scorer = Scorer(model, self.processing_class, self.batch_size, share_prefixes=self.share_prefixes)
        return self.task.by_bias_type(self.task.run(scorer))
