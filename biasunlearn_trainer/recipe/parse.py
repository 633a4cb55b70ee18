"""The typed recipe: one flat YAML, overridable from the command line, checked whole before anything is loaded.

    method: npo
    model_name_or_path: llava-hf/llava-1.5-7b-hf
    forget_dataset: my_forget.jsonl
    retain_dataset: my_retain.csv
    learning_rate: 1e-5

The keys are the fields of three dataclasses: `RunConfig` (data, evaluation, guard), `trl.ModelConfig` (the model, its
LoRA) and the config of the chosen method (a `transformers.TrainingArguments`). A recipe with `transfer_adapter_from`
has no method; it takes `TRANSFER_KEYS`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from biasunlearn_trainer.recipe.config import TRANSFER_KEYS, RunConfig
from biasunlearn_trainer.recipe.keys import Entry, nearest, read_overrides, read_yaml
from biasunlearn_trainer.recipe.values import FieldSpec, coerce_entry, field_specs
from biasunlearn_trainer.trainers.config import BUILT_MASKS, UnlearnConfig
from biasunlearn_trainer.trainers.registry import METHODS, get_method

RENAMED = {
    "warmup_ratio": "write the ratio as `warmup_steps`, a number below 1",
    "torch_dtype": "it is called `dtype`",
    "evaluation_strategy": "it is called `eval_strategy`",
    "no_cuda": "it is called `use_cpu`",
    "group_by_length": "it is `train_sampling_strategy: group_by_length`",
    "max_seq_length": "it is called `max_length`",
}
"""Keys of older libraries, whose nearest valid name would mislead."""


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one sentence a line.

    Args:
        faults: the sentences, each beginning with file and line where there is one.
        source: the recipe's name for the headline.
    """

    def __init__(self, faults: Sequence[str], source: str = "the recipe"):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


@dataclasses.dataclass
class Recipe:
    """A recipe that passed its checks.

    Attributes:
        path: the YAML, None when everything came from the command line.
        run: data, evaluation and reporting.
        model: the model, its dtype, LoRA and quantisation.
        training: the method's config; of a transfer the base of all of them.
        trainer_class: the method's trainer; None for a transfer, which trains nothing.
        given: what the recipe, the command line or a testbed set, by key.
        specs: every key that this method accepts.
    """

    path: Path | None
    run: RunConfig
    model: ModelConfig
    training: Any
    trainer_class: type | None
    given: dict[str, Any]
    specs: dict[str, FieldSpec]

    @property
    def source(self) -> str:
        """What messages call the recipe."""
        return str(self.path or "the command line")

    @property
    def streams(self) -> tuple[str, ...]:
        """The sets of rows that the method takes with these settings."""
        if self.trainer_class is None:
            return ()
        preserve = ("preserve",) if self.training.saliency_mask in BUILT_MASKS else ()
        return (*self.trainer_class.streams(self.training), *preserve)

    def fill(self, key: str, value: Any) -> None:
        """Sets a key that the recipe leaves out; what the recipe says stays."""
        if key not in self.given and value is not None:
            setattr(self.model if hasattr(self.model, key) else self.run, key, value)
            self.given[key] = value

    def to_yaml(self) -> str:
        """Writes the recipe so that it can be launched again: what was set, then every default as a comment."""
        lines = [f"# Resolved from {self.source}. What was set, with the default it replaces:"]
        for key, value in self.given.items():
            lines.append(f"{key}: {_flow(value)}  # default: {_flow(self.specs[key].default)}")
        lines.append("\n# Left at its default:")
        lines += [f"# {key}: {_flow(spec.default)}" for key, spec in self.specs.items() if key not in self.given]
        return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    value = getattr(value, "value", value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Reads and checks a recipe with its overrides.

    Args:
        arguments: `[RECIPE.yaml] [--key value ...]`; the path may also follow `--config`, as in TRL's scripts. A
            key on the command line wins over the file.

    Returns:
        The recipe. Nothing of the data or the model has been touched yet.

    Raises:
        RecipeError: with every fault at once.
    """
    path, words = _split_path(list(arguments))
    entries, faults = read_yaml(path) if path else ([], [])
    overrides, more = read_overrides(words)
    faults += more
    source = str(path or "the command line")
    entries += overrides
    if _is_transfer(entries):
        method, classes = None, [RunConfig, ModelConfig, UnlearnConfig]
        entries, more = _without_training(entries)
        specs = {key: spec for key, spec in field_specs(classes).items() if key in TRANSFER_KEYS}
    else:
        method, more = _method_of(entries, source)
        classes = _classes_of(method)
        specs = field_specs(classes)
        classes = classes if method else classes[:2]
    faults += more
    values, more = _values(entries, specs, method)
    faults += more
    values.setdefault("output_dir", os.path.join("outputs", path.stem if path else method or "transfer"))
    objects, more = _build(classes, values, source)
    faults += more
    trainer_class = get_method(method)[0] if method else None
    training = objects[2] if len(objects) > 2 else None
    faults += _missing(objects[0], objects[1], training, trainer_class, source)
    if faults:
        raise RecipeError(faults, source)
    return Recipe(path, objects[0], objects[1], training, trainer_class, values, specs)


def _split_path(arguments: list[str]) -> tuple[Path | None, list[str]]:
    if "--config" in arguments[:-1]:
        at = arguments.index("--config")
        return Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    if arguments and not arguments[0].startswith("--"):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _is_transfer(entries: list[Entry]) -> bool:
    found = {e.key: e for e in entries}.get("transfer_adapter_from")
    return found is not None and found.value is not None


def _without_training(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Takes out the keys that say how to train, each with a sentence; unknown keys stay for the common check."""
    trained = field_specs(_classes_of(None)).keys() - set(TRANSFER_KEYS)
    faults = [
        f"{e.where}: `{e.key}` is about training, and a recipe with `transfer_adapter_from` trains nothing. Leave out "
        "one of the two."
        for e in entries
        if e.key in trained
    ]
    return [e for e in entries if e.key not in trained], faults


def _method_of(entries: list[Entry], source: str) -> tuple[str | None, list[str]]:
    """Finds the method, which decides what other keys are valid; the last entry, from the command line, wins."""
    found = {e.key: e for e in entries}.get("method")
    if found is None or found.value is None:
        return None, [f"{source}: `method` is missing. Set it to one of {', '.join(METHODS)}."]
    if not isinstance(found.value, str):
        return None, []  # the wrong type is reported with the other values
    try:
        get_method(found.value)
    except (KeyError, ValueError) as err:
        return None, [f"{found.where}: {err.args[0]}"]
    return found.value, []


def _classes_of(method: str | None) -> list[type]:
    """The dataclasses whose fields are valid keys; while the method is unknown, those of every method."""
    configs = [get_method(method)[1]] if method else [get_method(name)[1] for name in METHODS]
    return [RunConfig, ModelConfig, *dict.fromkeys(configs)]


def _values(entries: list[Entry], specs: dict[str, FieldSpec], method: str | None) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    faults = []
    for entry in entries:
        entry = _positive(entry, specs)
        if entry.key not in specs:
            faults.append(f"{entry.where}: {_unknown_key(entry.key, specs, method)}")
            continue
        try:
            values[entry.key] = _resume_flag(entry) or coerce_entry(entry, specs[entry.key])
        except ValueError as err:
            faults.append(f"{entry.where}: {err}")
    return values, faults


def _positive(entry: Entry, specs: dict[str, FieldSpec]) -> Entry:
    """Reads `--no_flag` as `--flag false`, as argparse does for flags that are on by default."""
    positive = entry.key.removeprefix("no_")
    if entry.is_text and entry.value is True and entry.key not in specs and positive in specs:
        return dataclasses.replace(entry, key=positive, value="false")
    return entry


def _resume_flag(entry: Entry) -> str | None:
    """`resume_from_checkpoint` is declared as a path; true, as transformers documents it, means the last checkpoint."""
    is_true = entry.value is True or (entry.is_text and str(entry.value).lower() == "true")
    return "true" if entry.key == "resume_from_checkpoint" and is_true else None


def _unknown_key(key: str, specs: dict[str, FieldSpec], method: str | None) -> str:
    if key in RENAMED:
        return f"`{key}` is not a key here: {RENAMED[key]}."
    owners = [name for name in METHODS if key in field_specs([get_method(name)[1]])]
    if owners:
        return f"`{key}` belongs to method {' and '.join(owners)}, not to {method}. Remove it or change `method`."
    hint = nearest(key, specs)
    return f"unknown key `{key}`{hint or '. `--help` lists the valid ones'}."


def _build(classes: list[type], values: dict[str, Any], source: str) -> tuple[list[Any], list[str]]:
    """Builds each dataclass by TRL's parser from the values that passed, gathering what their own checks object to."""
    objects, faults = [], []
    for cls in classes:
        try:
            objects += TrlParser([cls]).parse_dict(values, allow_extra_keys=True)
        except (ValueError, TypeError) as err:
            objects.append(None)
            faults += [f"{source}: {line}" for line in str(err).splitlines()]
    return objects, faults


def _missing(
    run: RunConfig | None, model: ModelConfig | None, training: Any, trainer: type | None, source: str
) -> list[str]:
    """Names the required values that neither the recipe nor a testbed supplies."""
    if run is None or run.testbed:
        return []
    faults = []
    if model is not None and not model.model_name_or_path:
        faults.append(
            f"{source}: no model. Set `model_name_or_path` to a path or Hub id, or `testbed` to a planted-bias world."
        )
    if training is not None and trainer is None:  # a transfer
        if not run.tasks:
            faults.append(f"{source}: `tasks` is missing. Name what to measure, for instance stereoset=PATH.")
        return faults
    given = {stream: [] for stream in ("forget", "retain") if getattr(run, f"{stream}_dataset")}
    # A method may derive a set from another (refusals to prefer), so it is asked which are still missing.
    found = trainer.prepare_datasets(training, given) if training is not None else given
    for stream in trainer.streams(training) if training is not None else ("forget",):
        if stream not in found and not getattr(run, f"{stream}_dataset"):
            faults.append(
                f"{source}: `{stream}_dataset` is missing. Set it to a file, a folder or a Hub id, or set `testbed`."
            )
    return faults
