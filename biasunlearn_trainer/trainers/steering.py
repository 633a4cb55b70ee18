"""Steering by the stereotype score: swap the roles of a bias type, stop in time, keep the best weights.

All that a decision rests on stands in the log history, which every checkpoint holds: a resumed run reads it there and
goes on as if it had not been interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.checkpoints import PREFIX as CHECKPOINT_PREFIX
from biasunlearn_trainer.models import undisturbed

logger = logging.getLogger(__name__)

PREFIX = "probe/bias/"
PROBES_IN_A_ROW = 2


@dataclass(frozen=True)
class BiasReading:
    """What a probe measured of one bias type.

    Attributes:
        ss: stereotype score, percent; 50 is unbiased.
        lms: language modelling score, percent.
        num_items: the items that it was measured on.
    """

    ss: float
    lms: float
    num_items: int

    @property
    def icat(self) -> float:
        """LMS * min(SS, 100 - SS) / 50, percent."""
        return self.lms * min(self.ss, 100 - self.ss) / 50


Readings = Mapping[str, BiasReading]


@dataclass(frozen=True)
class SteeringRule:
    """When to swap and when to stop; the fields are those of `BiasUnlearnConfig`.

    Source: arXiv 2509.25673 section 3, with a margin against swapping on noise and a least number of items.
    """

    dynamic_swapping: bool = True
    swap_margin: float = 1.0
    early_stop: bool = True
    ss_tolerance: float = 2.0
    min_items: int = 200

    def controlled(self, readings: Readings, bias_types: Sequence[str]) -> list[str]:
        """The bias types that are trained on and have enough items to steer by."""
        return [t for t in bias_types if t in readings and readings[t].num_items >= self.min_items]

    def swapped(self, readings: Readings, bias_types: Sequence[str], before: set[str]) -> set[str]:
        """The bias types whose roles are exchanged from now on.

        Example:
            >>> readings = {"race": BiasReading(48.5, 90.0, 300), "gender": BiasReading(50.8, 90.0, 300)}
            >>> sorted(SteeringRule().swapped(readings, ["race", "gender"], before={"gender"}))
            ['gender', 'race']
        """
        swapped = set(before)
        for bias_type in self.controlled(readings, bias_types) if self.dynamic_swapping else ():
            if readings[bias_type].ss < 50 - self.swap_margin:
                swapped.add(bias_type)
            elif readings[bias_type].ss > 50 + self.swap_margin:
                swapped.discard(bias_type)
        return swapped

    def is_reached(self, readings: Readings, bias_types: Sequence[str]) -> bool:
        """Whether every controlled bias type is within the tolerance; False where none is controlled."""
        controlled = self.controlled(readings, bias_types)
        return bool(controlled) and all(abs(readings[t].ss - 50) <= self.ss_tolerance for t in controlled)


class BiasSteering(TrainerCallback):
    """Probes the bias at step 0 and every so many optimizer steps, and acts on what it finds.

    A probe is one record of the log: for each bias type `probe/bias/TYPE/` `ss`, `lms`, `num_items`, `swapped` (whether
    its roles are exchanged after this probe) and `controlled`; `probe/bias/score`, the mean ICAT over the controlled
    types; `probe/bias/held`, the lower one of this score and the probe's before; and `probe/bias/stopped` where the
    rule is met. The best weights are those of the highest `held`: while scores swing through 50, a single good one is
    a moment and no balance.

    Args:
        trainer: the trainer whose model is measured, with its `bias_types` and `swapped`.
        probe: maps the model to readings by bias type; collective.
        rule: when to swap and when to stop.
        every: optimizer steps between two probes, at least 1.
        keep_best: save a checkpoint whenever `held` is the highest so far.
    """

    def __init__(
        self,
        trainer: Any,
        probe: Callable[[nn.Module], Mapping[str, BiasReading | Mapping[str, Any]]],
        rule: SteeringRule,
        every: int,
        keep_best: bool,
    ):
        self.trainer, self.probe, self.rule, self.every, self.keep_best = trainer, probe, rule, every, keep_best

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Takes up the state of an interrupted run, or measures the model before its first step."""
        records = _records(state.log_history)
        if records:
            self.trainer.swapped = {t for t in self.trainer.bias_types if records[-1].get(f"{PREFIX}{t}/swapped")}
            if self.rule.early_stop and records[-1].get(f"{PREFIX}stopped"):
                control.should_training_stop = True  # the checkpoint is of the step at which the run ended
        if state.global_step == 0:
            readings = self.step(state, control)
            self._report_coverage(readings)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Probes before a checkpoint of the same step is written, so that the checkpoint knows of it."""
        if state.global_step % self.every:
            return
        try:
            self.step(state, control)
        except ValueError as err:
            # The first probe passed, so it is the weights that cannot be measured any more.
            logger.warning("step %d: the bias probe failed, training stops here. %s", state.global_step, err)
            control.should_training_stop = True

    def step(self, state: TrainerState, control: TrainerControl) -> dict[str, BiasReading]:
        """Measures, swaps, keeps the best, stops; returns what was measured."""
        with undisturbed(self.trainer.model):
            readings = {t: as_reading(t, reading) for t, reading in self.probe(self.trainer.model).items()}
        types, rule = self.trainer.bias_types, self.rule
        controlled = rule.controlled(readings, types)
        self.trainer.swapped = rule.swapped(readings, types, self.trainer.swapped)
        logs: dict[str, float] = {}
        for bias_type, reading in readings.items():
            values = {f.name: getattr(reading, f.name) for f in fields(reading)}
            values |= {"swapped": bias_type in self.trainer.swapped, "controlled": bias_type in controlled}
            logs |= {f"{PREFIX}{bias_type}/{name}": float(value) for name, value in values.items()}
        if controlled:
            score = sum(readings[t].icat for t in controlled) / len(controlled)
            before = [record[f"{PREFIX}score"] for record in _records(state.log_history)[-1:]]
            logs |= {f"{PREFIX}score": score, f"{PREFIX}held": min([score, *before])}
            self._keep_best(logs[f"{PREFIX}held"], state, control)
        if rule.early_stop and rule.is_reached(readings, types):
            earlier = [_readings(record) for record in _records(state.log_history)[1 - PROBES_IN_A_ROW :]]
            if len(earlier) == PROBES_IN_A_ROW - 1 and all(rule.is_reached(r, types) for r in earlier):
                logs[f"{PREFIX}stopped"] = 1.0
                control.should_training_stop = True
                logger.info("step %d: every bias type is within %g points of 50.", state.global_step, rule.ss_tolerance)
        # Logging clears `should_log`, which is set already where this step's losses are to be logged too.
        should_log = control.should_log
        self.trainer.log(logs)
        control.should_log = should_log
        return readings

    def _keep_best(self, held: float, state: TrainerState, control: TrainerControl) -> None:
        # The model before its first step is no result, however good it is.
        best = -math.inf if state.best_metric is None else state.best_metric
        if not self.keep_best or state.global_step == 0 or held <= best:
            return
        folder = Path(self.trainer.args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
        state.best_metric, state.best_global_step, state.best_model_checkpoint = held, state.global_step, str(folder)
        control.should_save = True

    def _report_coverage(self, readings: Readings) -> None:
        """Names the bias types that nothing steers."""
        controlled = self.rule.controlled(readings, self.trainer.bias_types)
        left = {t: readings[t].num_items if t in readings else 0 for t in self.trainer.bias_types}
        left = {t: number for t, number in left.items() if t not in controlled}
        named = ", ".join(f"{t} ({number})" for t, number in left.items())
        if not controlled:
            raise ValueError(
                f"No bias type of the training set has min_items={self.rule.min_items} probe items; it has: "
                f"{named or 'no bias type at all'}. Probe on more items, lower min_items, or switch dynamic_swapping "
                "and early_stop off and give no bias probe."
            )
        if left:
            logger.warning(
                "Not controlled, with fewer than min_items=%d probe items: %s. Their roles are not swapped, and the "
                "run does not wait for them.",
                self.rule.min_items,
                named,
            )


def as_reading(bias_type: str, value: BiasReading | Mapping[str, Any]) -> BiasReading:
    """A probe's reading, checked.

    Args:
        bias_type: whose reading it is, for an error.
        value: a `BiasReading`, or a mapping with its fields.

    Raises:
        ValueError: where a field is missing or a score is not within 0 and 100.
    """
    if isinstance(value, Mapping):
        names = {f.name for f in fields(BiasReading)}
        if set(value) != names:
            raise ValueError(
                f"The bias probe gives {sorted(value)} for {bias_type!r}; a BiasReading has {sorted(names)}."
            )
        value = BiasReading(**value)
    for name in ("ss", "lms"):
        if not 0 <= getattr(value, name) <= 100:
            raise ValueError(
                f"The bias probe gives {name}={getattr(value, name)!r} for {bias_type!r}; expected a percentage from 0 "
                "to 100."
            )
    return value


def _records(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The probes in a log history, oldest first."""
    return [record for record in history if any(key.startswith(PREFIX) for key in record)]


def _readings(record: Mapping[str, Any]) -> dict[str, BiasReading]:
    types = [key.removeprefix(PREFIX).removesuffix("/ss") for key in record if key.endswith("/ss")]
    names = [f.name for f in fields(BiasReading)]
    return {t: BiasReading(*(record[f"{PREFIX}{t}/{name}"] for name in names)) for t in types}
