"""Tasks by name: `NAME[@LABEL][=PATH]` on a command line and in a recipe."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from biasunlearn_trainer.eval.tasks.base import Task

# name -> (module, class); imported when a task is loaded, so that naming one costs nothing.
TASKS: dict[str, tuple[str, str]] = {
    "planted": ("biasunlearn_trainer.eval.tasks.planted", "PlantedTask"),
    "entities": ("biasunlearn_trainer.eval.tasks.entities", "EntitiesTask"),
    "stereoset": ("biasunlearn_trainer.eval.tasks.stereoset", "StereoSetTask"),
    "crows_pairs": ("biasunlearn_trainer.eval.tasks.crows_pairs", "CrowsPairsTask"),
    "bbq": ("biasunlearn_trainer.eval.tasks.bbq", "BBQTask"),
    "bbq_sum": ("biasunlearn_trainer.eval.tasks.bbq", "BBQSumTask"),
    "bbq_letters": ("biasunlearn_trainer.eval.tasks.bbq", "BBQLettersTask"),
    "bbq_generate": ("biasunlearn_trainer.eval.tasks.bbq", "BBQGenerateTask"),
    "behaviour": ("biasunlearn_trainer.eval.tasks.behaviour", "BehaviourTask"),
    "behaviour_words": ("biasunlearn_trainer.eval.tasks.behaviour", "BehaviourWordsTask"),
    "perplexity": ("biasunlearn_trainer.eval.tasks.perplexity", "PerplexityTask"),
    "multiple_choice": ("biasunlearn_trainer.eval.tasks.multiple_choice", "MultipleChoiceTask"),
    "lm_eval": ("biasunlearn_trainer.eval.tasks.lm_eval_bridge", "LmEvalTask"),
    "mllmu_bench": ("biasunlearn_trainer.eval.tasks.mllmu_bench", "MLLMUBenchTask"),
    "mllmu_bench_generate": ("biasunlearn_trainer.eval.tasks.mllmu_bench", "MLLMUBenchGenerateTask"),
    "mllmu_bench_test": ("biasunlearn_trainer.eval.tasks.mllmu_bench", "MLLMUBenchTestTask"),
    "mllmu_bench_test_generate": ("biasunlearn_trainer.eval.tasks.mllmu_bench", "MLLMUBenchTestGenerateTask"),
    "clear": ("biasunlearn_trainer.eval.tasks.clear", "ClearTask"),
    "clear_generate": ("biasunlearn_trainer.eval.tasks.clear", "ClearGenerateTask"),
    "tofu": ("biasunlearn_trainer.eval.tasks.tofu", "TofuTask"),
    "sb_bench": ("biasunlearn_trainer.eval.tasks.sb_bench", "SBBenchTask"),
    "sb_bench_sum": ("biasunlearn_trainer.eval.tasks.sb_bench", "SBBenchSumTask"),
    "sb_bench_letters": ("biasunlearn_trainer.eval.tasks.sb_bench", "SBBenchLettersTask"),
    "sb_bench_generate": ("biasunlearn_trainer.eval.tasks.sb_bench", "SBBenchGenerateTask"),
    "image_bbq": ("biasunlearn_trainer.eval.tasks.sb_bench", "ImageBBQTask"),
    "image_bbq_letters": ("biasunlearn_trainer.eval.tasks.sb_bench", "ImageBBQLettersTask"),
    "pairs": ("biasunlearn_trainer.eval.tasks.pairs", "PairsTask"),
    "debias_ic": ("biasunlearn_trainer.eval.tasks.debias", "DebiasICTask"),
    "debias_vqa": ("biasunlearn_trainer.eval.tasks.debias", "DebiasVQATask"),
    "forget_set": ("biasunlearn_trainer.eval.tasks.training_sets", "ForgetSetTask"),
    "retain_set": ("biasunlearn_trainer.eval.tasks.training_sets", "RetainSetTask"),
}
# Tasks that may bring their own data: the default data of a call are not theirs.
OWN_DATA = frozenset({"lm_eval"})
# Tasks whose path is ROOT/CONFIG, which need not be a folder: on the Hub, or ROOT/CONFIG.json.
PUBLISHED = frozenset(name for name, (module, _) in TASKS.items() if module.endswith(("bench", "clear", "tofu")))


@dataclass(frozen=True)
class TaskSpec:
    """A task as it is asked for.

    Attributes:
        name: which task.
        label: tells two measurements of the same task apart, for instance two data sets; may be None.
        path: its data; None takes the default data of the call.
    """

    name: str
    label: str | None = None
    path: str | None = None

    @property
    def key(self) -> str:
        """The task's key in results: `NAME` or `NAME@LABEL`."""
        return self.name if self.label is None else f"{self.name}@{self.label}"


def parse_task_spec(text: str) -> TaskSpec:
    """Read `NAME[@LABEL][=PATH]`.

    Raises:
        ValueError: for an unknown task, with the nearest known one, and for an empty label or path.

    Example:
        >>> parse_task_spec("stereoset@report=data/report.json")
        TaskSpec(name='stereoset', label='report', path='data/report.json')
        >>> parse_task_spec("planted").key
        'planted'
    """
    key, has_path, path = text.partition("=")
    name, has_label, label = key.partition("@")
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown task {name!r} in {text!r}.{hint} There are: {', '.join(TASKS)}.")
    if (has_label and not label) or (has_path and not path):
        raise ValueError(
            f"Empty {'path' if has_path and not path else 'label'} in {text!r}; write NAME[@LABEL][=PATH]."
        )
    return TaskSpec(name, label or None, path or None)


def load_task(spec: str | TaskSpec, default_data: str | Path | None = None, limit: int | None = None) -> Task:
    """Load a task with its data.

    Args:
        spec: what to load, as a string or parsed.
        default_data: data of a task whose spec names none: its file or folder, or a folder that holds one named like
            the task.
        limit: measure at most this many items, drawn evenly over the groups of the data; None measures all.

    Raises:
        ValueError: for an unknown task, one without data, or faulty data.
        FileNotFoundError: where the data are not there.
    """
    spec = parse_task_spec(spec) if isinstance(spec, str) else spec
    path = spec.path
    if path is None and spec.name not in OWN_DATA:
        if default_data is None:
            raise ValueError(
                f"Task {spec.key!r} has no data. Write {spec.key}=PATH, or give --data PATH for all tasks."
            )
        inside = Path(default_data).expanduser() / spec.name
        path = str(inside if inside.exists() else default_data)
    if path is not None and spec.name not in PUBLISHED and not Path(path).expanduser().exists():
        raise FileNotFoundError(f"Task {spec.key!r}: there is nothing at {path}.")
    module, name = TASKS[spec.name]
    return getattr(importlib.import_module(module), name)(spec.key, path, limit)


def load_tasks(
    specs: Iterable[str], default_data: str | Path | None = None, limit: int | None = None
) -> dict[str, Task]:
    """Load several tasks by their keys, and report what is wrong with all of them at once.

    Raises:
        ValueError: listing every fault; also where two specs have one key.
    """
    tasks: dict[str, Task] = {}
    faults = []
    for text in specs:
        try:
            spec = parse_task_spec(text)
            if spec.key in tasks:
                raise ValueError(f"Task {spec.key!r} is asked for twice. Tell the two apart: {spec.name}@LABEL=PATH.")
            tasks[spec.key] = load_task(spec, default_data, limit)
        except (ValueError, OSError) as err:
            faults.append(str(err))
    if faults:
        raise ValueError("\n".join(faults))
    return tasks
