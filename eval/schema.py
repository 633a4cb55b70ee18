"""The layout of results: what every evaluation writes and every report reads.

    {"schema_version", "model", "tasks": {TASK: {"metrics": {NAME: METRIC}, "groups": {GROUP: {NAME: METRIC}}}}}

with METRIC = {"value", "n", "ci95": [low, high], "higher_is_better", "ideal"}. The `results.json` of a training
run holds several such results by name: `before`, `after`, and `oracle` where there is one. docs/schemas.md
describes the fields.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MetricValue:
    """One measured number.

    Attributes:
        value: the measurement, in the metric's unit (docs/metrics.md).
        n: number of items it was measured on.
        ci95: lower and upper end of its 95 % interval, in the same unit.
        higher_is_better: None where neither direction is better, as with a score whose ideal lies inside its range.
        ideal: the value of a model that is as it should be; None where there is none.
    """

    value: float
    n: int
    ci95: tuple[float, float]
    higher_is_better: bool | None = True
    ideal: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The metric as JSON holds it."""
        return {**asdict(self), "ci95": list(self.ci95)}


@dataclass
class TaskResult:
    """What one task measured, overall and by group (bias type, part of the data)."""

    metrics: dict[str, MetricValue] = field(default_factory=dict)
    groups: dict[str, dict[str, MetricValue]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The task's results as JSON holds them."""
        return {
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
            "groups": {
                group: {name: metric.to_dict() for name, metric in metrics.items()}
                for group, metrics in self.groups.items()
            },
        }


@dataclass
class EvalResult:
    """What one evaluation of one model measured, by task key (`NAME` or `NAME@LABEL`)."""

    schema_version: int = SCHEMA_VERSION
    model: str = ""
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "schema_version": self.schema_version,
            "model": self.model,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "result") -> EvalResult:
        """Read a result back.

        Args:
            data: what `to_dict` gave.
            where: the name that error messages begin with, for instance the file.

        Raises:
            ValueError: listing every fault: unknown version, missing or unknown keys, numbers that are none.
        """
        faults = _faults(data, where)
        if faults:
            raise ValueError("This is no evaluation result:\n  " + "\n  ".join(faults))
        tasks = {
            name: TaskResult(
                _read_metrics(task["metrics"]),
                {group: _read_metrics(metrics) for group, metrics in task["groups"].items()},
            )
            for name, task in data["tasks"].items()
        }
        return cls(data["schema_version"], data["model"], tasks)


def save_results(results: EvalResult | Mapping[str, EvalResult], path: str | Path) -> Path:
    """Write one result, or several by name (`before`, `after`, `oracle`), as JSON.

    The file appears whole or not at all.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON cannot hold.
    """
    path = Path(path)
    single = isinstance(results, EvalResult)
    data = results.to_dict() if single else {name: result.to_dict() for name, result in results.items()}
    faults = _faults(data, "result") if single else [f for name, part in data.items() for f in _faults(part, name)]
    if faults:
        raise ValueError(f"{path} was not written:\n  " + "\n  ".join(faults))
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all, making its folder where needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_results(path: str | Path) -> EvalResult | dict[str, EvalResult]:
    """Read what `save_results` wrote: one result, or several by name.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is no JSON or does not hold results; every fault is listed.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path} is no JSON file: {err}") from err
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: expected a result or several by name, got {type(data).__name__}.")
    if "schema_version" in data:
        return EvalResult.from_dict(data, str(path))
    return {name: EvalResult.from_dict(part, f"{path}: {name}") for name, part in data.items()}


def _read_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricValue]:
    return {name: MetricValue(**{**metric, "ci95": tuple(metric["ci95"])}) for name, metric in metrics.items()}


def _faults(data: Any, where: str) -> list[str]:
    """Everything that keeps `data` from being a result."""
    faults = _key_faults(data, {"schema_version", "model", "tasks"}, where)
    if faults:
        return faults
    if data["schema_version"] != SCHEMA_VERSION:
        return [
            f"{where}: schema_version {data['schema_version']!r}, this version of the library reads {SCHEMA_VERSION}"
        ]
    if not isinstance(data["model"], str) or not isinstance(data["tasks"], Mapping):
        return [f"{where}: `model` must be a string and `tasks` a mapping"]
    for task, result in data["tasks"].items():
        at = f"{where}: tasks.{task}"
        wrong = _key_faults(result, {"metrics", "groups"}, at)
        faults += wrong
        if not wrong:
            for place, metrics in [("metrics", result["metrics"])] + [
                (f"groups.{group}", metrics) for group, metrics in result["groups"].items()
            ]:
                for name, metric in metrics.items():
                    faults += _metric_faults(metric, f"{at}.{place}.{name}")
    return faults


def _metric_faults(metric: Any, where: str) -> list[str]:
    faults = _key_faults(metric, {"value", "n", "ci95", "higher_is_better", "ideal"}, where)
    if faults:
        return faults
    if not _is_number(metric["value"]):
        faults.append(f"{where}: value must be a finite number, got {metric['value']!r}")
    if not isinstance(metric["n"], int) or isinstance(metric["n"], bool) or metric["n"] < 1:
        faults.append(f"{where}: n must be a count of at least 1, got {metric['n']!r}; leave out what is unmeasured")
    ends = metric["ci95"]
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] > ends[1]:
        faults.append(f"{where}: ci95 must be two finite numbers [low, high], got {ends!r}")
    if metric["higher_is_better"] not in (True, False, None):
        faults.append(f"{where}: higher_is_better must be true, false or null, got {metric['higher_is_better']!r}")
    if metric["ideal"] is not None and not _is_number(metric["ideal"]):
        faults.append(f"{where}: ideal must be a finite number or null, got {metric['ideal']!r}")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key_faults(data: Any, expected: set[str], where: str) -> list[str]:
    if not isinstance(data, Mapping):
        return [f"{where}: expected a mapping with {sorted(expected)}, got {type(data).__name__}"]
    faults = [f"{where}: {key!r} is missing" for key in sorted(expected - set(data))]
    return faults + [f"{where}: unknown key {key!r}" for key in sorted(set(data) - expected)]
