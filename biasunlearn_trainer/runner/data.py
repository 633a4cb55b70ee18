"""From the names in a recipe to checked rows: the testbed's fill-ins, loading, leakage, fingerprints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import tqdm
from datasets import Dataset

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.data_builders.leakage import check_leakage
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.tasks import load_task, parse_task_spec
from biasunlearn_trainer.eval.tasks.training_sets import ForgetSetTask, RetainSetTask
from biasunlearn_trainer.fingerprints import rows_fingerprint
from biasunlearn_trainer.hub.licences import sources_of
from biasunlearn_trainer.hub.naming import in_testbed
from biasunlearn_trainer.probes import StereoSetProbe
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.recipe.config import TESTBED_PREFIX
from biasunlearn_trainer.streams import modality_batches

logger = logging.getLogger(__name__)

STREAMS = ("forget", "retain", "preferred", "utility", "preserve", "guidance")
CHECKED_AT_ONCE = 32
# A task with this label measures trained rows on purpose, to set beside the unseen ones.
SEEN_LABEL = "@train"
MEASURED_OF_TRAINING_SETS = 500
# A testbed may probe on the rows it reports where no decision rests on the probe; a bias probe steers the training, so
# its rows must be others.
LEAKING_PAIRS = tuple(("forget", other) for other in ("retain", "utility", "preserve", "report", "probe"))
STEERING_PAIRS = (("probe", "report"),)


def resolve_testbed(recipe: Recipe) -> None:
    """Builds the recipe's testbed where it is not cached, and fills in what the recipe leaves out.

    Args:
        recipe: changed in place: model, oracle, the datasets of the method's streams, and tasks.

    Raises:
        RecipeError: the recipe asks for an instruction-tuned sibling or a split that the testbed does not have.
    """
    if recipe.run.testbed is None:
        return
    from biasunlearn_trainer.testbed import build

    # One process builds, the others wait and find the cache.
    with PartialState().main_process_first():
        world = build(recipe.run.testbed, seed=recipe.run.testbed_seed)
    if recipe.run.testbed_split is not None:
        try:
            world = world.with_split(recipe.run.testbed_split)
        except ValueError as err:
            raise RecipeError([f"testbed_split: {err}"], recipe.source) from err
    model, tasks = world.model_path, list(world.tasks)
    if recipe.run.testbed_model == "instruct":
        if not world.instruct_path:
            fault = f"testbed_model: testbed {recipe.run.testbed} has no instruct model. Use traits, or leave it out."
            raise RecipeError([fault], recipe.source)
        model, tasks = world.instruct_path, [*tasks, *world.instruct_tasks]
    recipe.fill("model_name_or_path", str(model))
    recipe.fill("oracle_model", str(world.oracle_path) if world.oracle_path else None)
    for stream in recipe.streams:
        _resolve_stream(recipe, f"{stream}_dataset", stream, world.datasets)
    recipe.fill("tasks", tasks)
    for key in ("tasks", "probes"):
        _resolve_tasks(recipe, key, {**world.datasets, **dict(spec.split("=", 1) for spec in tasks)})


def _resolve_tasks(recipe: Recipe, key: str, data: Mapping[str, str]) -> None:
    """Lets the recipe's own tasks name data of the testbed: `behaviour=testbed:forget`, or a task of the testbed."""
    if getattr(recipe.run, key) is None:
        return
    resolved, faults = [], []
    for spec in getattr(recipe.run, key):
        task, _, path = spec.partition("=")
        name = path.removeprefix(TESTBED_PREFIX) if path.startswith(TESTBED_PREFIX) else task
        if name in data and (path.startswith(TESTBED_PREFIX) or not path):
            spec = f"{task}={data[name]}"
        elif path.startswith(TESTBED_PREFIX):
            there = f"the testbed {recipe.run.testbed!r} has no {name!r}; it has: {', '.join(data)}"
            faults.append(f"{key}: {spec}: {there}.")
        resolved.append(spec)
    if faults:
        raise RecipeError(faults, recipe.source)
    setattr(recipe.run, key, resolved)
    recipe.given[key] = resolved


def _resolve_stream(recipe: Recipe, key: str, stream: str, datasets: Mapping[str, str]) -> None:
    """Fills a stream in from the testbed's set of its name, or of the name in `testbed:NAME`."""
    named = getattr(recipe.run, key)
    if named is None:
        recipe.fill(key, datasets.get(stream))
    elif named.startswith(TESTBED_PREFIX):
        name = named.removeprefix(TESTBED_PREFIX)
        if name not in datasets:
            raise RecipeError(
                [f"{key}: the testbed {recipe.run.testbed!r} has no set {name!r}; it has: {', '.join(datasets)}."],
                recipe.source,
            )
        setattr(recipe.run, key, datasets[name])
        recipe.given[key] = datasets[name]


def load_streams(recipe: Recipe) -> dict[str, Dataset]:
    """Loads and checks the rows of every stream that the recipe names.

    Args:
        recipe: with its testbed resolved.

    Returns:
        Rows by stream.

    Raises:
        RecipeError: listing the faults of all sets, with file and row.
    """
    sets: dict[str, Dataset] = {}
    faults = []
    for stream in STREAMS:
        source = getattr(recipe.run, f"{stream}_dataset")
        if source is None:
            continue
        if stream not in recipe.streams:
            logger.warning("%s does not use %s_dataset; it is left out.", recipe.run.method, stream)
            continue
        try:
            with PartialState().main_process_first():
                sets[stream] = load_rows(source)
        except (ValueError, OSError) as err:
            faults.append(f"{stream}_dataset: {err}")
    if faults:
        raise RecipeError(faults, recipe.source)
    return sets


def load_tasks(recipe: Recipe) -> tuple[list[Any], list[Any], Any | None]:
    """Loads the tasks and the probes of a recipe.

    Args:
        recipe: with its testbed resolved.

    Returns:
        Tasks measured before and after, tasks measured in training, and the one that steers the training; a probe
        without a path is the task of its name.

    Raises:
        RecipeError: listing the specs that name no task or no data.
    """
    faults: list[str] = []
    named = {}
    for spec in recipe.run.tasks or []:
        with _gathering(faults, f"tasks: {spec}"):
            named[parse_task_spec(spec).key] = spec
    tasks = []
    for spec in named.values():
        with _gathering(faults, f"tasks: {spec}"):
            tasks.append(load_task(spec))
    probes = []
    for spec in recipe.run.probes or []:
        with _gathering(faults, f"probes: {spec}"):
            probes.append(load_task(named.get(spec, spec), limit=recipe.run.probe_limit))
    bias_probe = None
    spec = recipe.run.bias_probe
    with _gathering(faults, f"bias_probe: {spec}"):
        if recipe.trainer_class is not None:
            recipe.trainer_class.check_bias_probe(recipe.training, spec)
        if spec is not None:
            bias_probe = load_task(named.get(spec, spec))
            StereoSetProbe.check(bias_probe)
    if faults:
        raise RecipeError(faults, recipe.source)
    return tasks, probes, bias_probe


@contextmanager
def _gathering(faults: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OSError) as err:
        faults.append(f"{what}: {err.args[0] if isinstance(err, KeyError) else err}")


def training_set_tasks(recipe: Recipe) -> list[Any]:
    """What a run without tasks measures: the rows it trains on, so that it says at least what training did to them."""
    tasks = {"forget": ForgetSetTask, "retain": RetainSetTask}
    named = {stream: getattr(recipe.run, f"{stream}_dataset") for stream in tasks if stream in recipe.streams}
    return [tasks[s](f"{s}_set", path, MEASURED_OF_TRAINING_SETS) for s, path in named.items() if path]


def check_leaks(
    recipe: Recipe,
    sets: Mapping[str, Dataset],
    tasks: Sequence[Any],
    probes: Sequence[Any],
    bias_probe: Any | None = None,
) -> None:
    """Compares the sets that must not share rows.

    Args:
        recipe: `allow_leakage` turns the error into a warning.
        sets: rows by stream.
        tasks: whose rows are reported.
        probes: whose rows are measured in training.
        bias_probe: whose rows steer the training; what it is reported on besides itself must be other rows.

    Raises:
        RecipeError: naming the shared rows.
    """
    unseen = [task for task in tasks if not task.name.endswith(SEEN_LABEL)]
    steering = [bias_probe] if bias_probe is not None and not bias_probe.name.endswith(SEEN_LABEL) else []
    watched = [probe for probe in probes if not probe.name.endswith(SEEN_LABEL)]
    _compare(recipe, {**sets, "report": _rows(unseen), "probe": _rows([*watched, *steering])}, LEAKING_PAIRS)
    reported = [task for task in unseen if bias_probe is None or task.name != bias_probe.name]
    _compare(recipe, {"probe": _rows(steering), "report": _rows(reported)}, STEERING_PAIRS)


def _compare(recipe: Recipe, named: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    named = {name: rows for name, rows in named.items() if len(rows)}
    pairs = [pair for pair in pairs if pair[0] in named and pair[1] in named]
    if not pairs:
        return
    try:
        check_leakage(named, on_leak="warn" if recipe.run.allow_leakage else "raise", pairs=pairs)
    except ValueError as err:
        raise RecipeError([f"{err}\nSet allow_leakage: true to train all the same."], "the data") from err


def check_collation(recipe: Recipe, sets: Mapping[str, Dataset], processing_class: Any) -> None:
    """Turns every row into tensors once, so that no row stops a run that has trained for hours.

    Args:
        recipe: with its testbed resolved.
        sets: rows by stream.
        processing_class: the model's tokenizer or processor.

    Raises:
        RecipeError: naming, for each set, the first row that does not do.
    """
    state, args, faults = PartialState(), recipe.training, []
    collator = CompletionCollator(processing_class, args.max_length, args.append_eos)
    for stream, rows in sets.items():
        batches = modality_batches(rows, CHECKED_AT_ONCE)[state.process_index :: state.num_processes]
        try:
            for numbers in tqdm(batches, desc=f"Checking the {stream} set", leave=False):
                collator([{**rows[i], "index": i} for i in numbers])
        except ValueError as err:
            faults.append(f"{stream}_dataset: {err}")
    if faults:
        raise RecipeError(faults, recipe.source)


def _rows(tasks: Sequence[Any]) -> list[dict]:
    return [row for task in tasks for row in task.rows]


def describe_data(recipe: Recipe, sets: Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """What `environment.json` records of the data: source, licences, rows and fingerprint of each stream."""
    places = {stream: getattr(recipe.run, f"{stream}_dataset") for stream in sets}
    home = str(Path(recipe.model.model_name_or_path).parent) if recipe.run.testbed else None
    return {
        stream: {
            "source": places[stream],
            "sources": sources_of(places[stream], recipe.run.testbed if in_testbed(places[stream], home) else None),
            "rows": len(rows),
            "fingerprint": rows_fingerprint(rows),
        }
        for stream, rows in sets.items()
    }
