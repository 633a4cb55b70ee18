"""From a recipe to a result: evaluate, unlearn, evaluate again, report.

    from biasunlearn_trainer.recipe import parse_recipe
    from biasunlearn_trainer.runner import run
    results = run(parse_recipe(["recipes/demo.yaml", "--output_dir", "out"]))

Every process runs the same lines; only the main one prints and writes.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from biasunlearn_trainer.eval.compare import verdicts
from biasunlearn_trainer.eval.report import terminal_table, write_report
from biasunlearn_trainer.eval.schema import EvalResult, save_results
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.guards import CollapseGuard
from biasunlearn_trainer.hub.finished import note_measured
from biasunlearn_trainer.hub.naming import public_name
from biasunlearn_trainer.models import load_config, load_processor
from biasunlearn_trainer.probes import ProbeCallback, StereoSetProbe
from biasunlearn_trainer.recipe import Recipe, RecipeError, parse_recipe
from biasunlearn_trainer.recipe.config import RunConfig
from biasunlearn_trainer.run_files import FIGURE_FILE, RESULTS_FILE, STATE_FILE
from biasunlearn_trainer.runner.cases import case_candidates
from biasunlearn_trainer.runner.data import (
    check_collation,
    check_leaks,
    describe_data,
    load_streams,
    load_tasks,
    resolve_testbed,
    training_set_tasks,
)
from biasunlearn_trainer.runner.failures import RunError, explained, left
from biasunlearn_trainer.runner.folder import (
    RECORDS_FOLDER,
    check_same_start,
    check_writable,
    prepare_folder,
    write_records,
)
from biasunlearn_trainer.runner.guidance import check_guidance, give_guidance
from biasunlearn_trainer.runner.interrupts import Interrupts
from biasunlearn_trainer.runner.launch import check_launch
from biasunlearn_trainer.runner.models import load_for_run
from biasunlearn_trainer.runner.publishing import begin_publishing, check_publishing
from biasunlearn_trainer.runner.record_cache import RecordCache, records_home
from biasunlearn_trainer.runner.saliency import add_to_report, write_mask_report
from biasunlearn_trainer.runner.trackers import check_trackers, log_results
from biasunlearn_trainer.runner.transfer import checked_adapter, describe_transfer, transfer
from biasunlearn_trainer.saliency.distribution import Distribution
from biasunlearn_trainer.sharding import is_fsdp, running, whole_weights
from biasunlearn_trainer.trainers.registry import METHODS, get_method

Items = dict[str, list[dict]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe from the command line.

    Args:
        arguments: `RECIPE.yaml [--key value ...]`; the process's own when None.

    Returns:
        The exit status: 0; 2 for a faulty recipe, dataset or model path, 1 for a run that broke off, both with what
        happened on stderr; 130 or 143 after Ctrl-C or SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if "--help" in arguments or "-h" in arguments:
        method = arguments[arguments.index("--method") + 1] if "--method" in arguments[:-1] else next(iter(METHODS))
        TrlParser([RunConfig, ModelConfig, get_method(method)[1]], prog="recipes/run.py RECIPE.yaml").print_help()
        return 0
    recipe, status = None, 0
    try:
        recipe = parse_recipe(arguments)
        run(recipe)
    except (RecipeError, RunError, KeyboardInterrupt) as err:
        status = {RecipeError: 2, RunError: 1}.get(type(err)) or getattr(err, "exit_status", 130)
        if os.environ.get("RANK", "0") == "0":
            print(err if str(err) else "Interrupted.", file=sys.stderr)
            if isinstance(err, KeyboardInterrupt) and recipe is not None:
                print(left(recipe), file=sys.stderr)
    return status


def run(recipe: Recipe) -> dict[str, EvalResult] | None:
    """Carries a recipe out.

    Args:
        recipe: what `parse_recipe` returned; its testbed is resolved in place.

    Returns:
        Results by name, `before`, `after` and, where there is one, `oracle`; None for a dry run or a plan.

    Raises:
        RecipeError: the data, the model's path or the output folder do not do; nothing was written or trained.
        RunError: memory or disk ran out, or the weights are no numbers any more.
        Interrupted: Ctrl-C or SIGTERM came in training; the step was finished and saved.
    """
    if recipe.run.plan:
        from biasunlearn_trainer.plan import show_plan

        show_plan(recipe)
        return None
    started = time.monotonic()
    check_writable(recipe)
    check_launch(recipe)
    check_trackers(recipe)
    check_publishing(recipe)
    resolve_testbed(recipe)
    sets = load_streams(recipe)
    tasks, probes, bias_probe = load_tasks(recipe)
    check_leaks(recipe, sets, tasks, probes, bias_probe)
    tasks = tasks or training_set_tasks(recipe)
    config, processing_class = config_and_processor(recipe)
    adapter, notes = checked_adapter(recipe, config)
    check_collation(recipe, sets, processing_class)
    check_guidance(recipe, sets, processing_class)
    state = PartialState()
    checkpoint = prepare_folder(recipe, config, may_delete=state.is_main_process and not recipe.run.dry_run)
    if state.is_main_process:
        if adapter:
            print(describe_transfer(recipe, config, adapter, tasks), flush=True)
        else:
            print(describe_plan(recipe, config, sets, tasks, probes, bias_probe, checkpoint), flush=True)
    if recipe.run.dry_run:
        return None
    publish = begin_publishing(recipe)
    state.wait_for_everyone()
    evaluation = _Evaluation(recipe, tasks, processing_class)
    if adapter:
        history, messages = [], notes + transfer(recipe, evaluation, adapter)
    else:
        history, messages = _unlearn(recipe, evaluation, sets, probes, bias_probe, checkpoint)
    if state.is_main_process:
        _report(recipe, evaluation, history, messages, time.monotonic() - started)
        publish()
    return evaluation.results


def config_and_processor(recipe: Recipe) -> tuple[Any, Any]:
    """The configuration of the recipe's model, and its tokenizer or processor."""
    name, options = recipe.model.model_name_or_path, {"trust_remote_code": recipe.run.trust_remote_code}
    try:
        config = load_config(name, recipe.model.model_revision, **options)
        return config, load_processor(name, revision=recipe.model.model_revision, **options)
    except (OSError, ValueError, ImportError) as err:
        raise RecipeError([f"model_name_or_path: {err}"], recipe.source) from err


def describe_plan(
    recipe: Recipe,
    config: Any,
    sets: Mapping[str, Any],
    tasks: Sequence[Any],
    probes: Sequence[Any],
    bias_probe: Any | None,
    checkpoint: str | None,
) -> str:
    """Says in a few lines what a run does.

    Args:
        recipe: with its testbed resolved.
        config: the model's configuration.
        sets: rows by stream.
        tasks: evaluations before and after.
        probes: evaluations during training.
        bias_probe: the one that steers it, if any.
        checkpoint: where the run continues from, None for the beginning.
    """
    args, lora = recipe.training, recipe.model
    shared = TrainingArguments.__dataclass_fields__.keys() - {"learning_rate"}
    own = [
        f"{key} {recipe.given[key]}" for key in type(args).__dataclass_fields__ if key in recipe.given.keys() - shared
    ]
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * -(-len(sets["forget"]) // step))
    adapter = f"LoRA r {lora.lora_r}, alpha {lora.lora_alpha}" if lora.use_peft else "full fine-tuning"
    measured = [f"{task.name} ({len(task.rows)} rows)" for task in tasks]
    probed = [task.name for task in probes]
    if bias_probe is not None:
        probed.append(f"{bias_probe.name} ({len(bias_probe.rows)} rows, steers the training)")
    lines = {
        "recipe": recipe.source,
        "method": f"{recipe.run.method} ({', '.join(own)})",
        "model": f"{lora.model_name_or_path} ({', '.join([*(config.architectures or []), adapter])})",
        "data": ", ".join(f"{name} {len(rows)} rows" for name, rows in sets.items()),
        "steps": f"{steps} of {step} rows on {args.world_size} process(es), {args.device}",
        "tasks": ", ".join(measured),
        "probes": f"{', '.join(probed)} every {args.probe_steps} steps" if probed else "none",
        "output": f"{args.output_dir}{f', continuing from {checkpoint}' if checkpoint else ''}",
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


class _Evaluation:
    """Measures models one after the other; what is known stands on disk at every moment."""

    def __init__(self, recipe: Recipe, tasks: Sequence[Any], processing_class: Any):
        self.recipe, self.tasks, self.processing_class = recipe, tasks, processing_class
        self.results: dict[str, EvalResult] = {}
        self.items: dict[str, Items] = {}
        self.saliency: Distribution | None = None

    def begin(self, model: torch.nn.Module, source: str, weights: str | None = None) -> None:
        """Measures the model as it is, and the oracle where there is one; every process has to call it.

        Args:
            model: the one to unlearn.
            source: where it came from.
            weights: its `model_hash`, where it is known.
        """
        self.measure("before", model, source, weights)
        oracle = self.recipe.run.oracle_model
        if oracle:
            model = load_for_run(self.recipe, oracle)
            with running(model):
                self.measure("oracle", model, oracle)

    def measure(self, name: str, model: torch.nn.Module, source: str, weights: str | None = None) -> None:
        """Measures a model as `before`, `after` or `oracle` and writes results.json; every process has to call it."""
        run_config, args = self.recipe.run, self.recipe.training
        scorer = Scorer(
            model, self.processing_class, run_config.eval_batch_size, args.append_eos, run_config.share_prefixes
        )
        answers = run_config.case_studies > 0
        with explained(self.recipe, "evaluation"):
            if name == "after":
                items = {task.name: task.run(scorer, answers=answers) for task in self.tasks}
            else:
                # In the run's own folder, too, for a run that goes on where the cache folder is another one.
                shared = [records_home()] if run_config.keep_records else []
                cache = RecordCache(Path(args.output_dir) / RECORDS_FOLDER, *shared)
                items = cache.run(self.tasks, scorer, answers, weights)
        before = self.items.get("before", {})
        summaries = {task.name: task.summarise(items[task.name], before.get(task.name)) for task in self.tasks}
        self.items[name] = items
        self.results[name] = EvalResult(model=source, tasks=summaries)
        if PartialState().is_main_process:
            save_results(self.results, Path(args.output_dir) / RESULTS_FILE)


def _unlearn(
    recipe: Recipe,
    evaluation: _Evaluation,
    sets: Mapping[str, Any],
    probes: Sequence[Any],
    bias_probe: Any | None,
    checkpoint: str | None,
) -> tuple[list[dict], list[str]]:
    """Measures, trains, saves and measures again; returns the log and what the guard said."""
    source, output_dir = recipe.model.model_name_or_path, recipe.training.output_dir
    data = describe_data(recipe, sets)
    if checkpoint:
        check_same_start(checkpoint, data)
    # FSDP's weights cannot be called before training: the model is measured whole first, then loaded in shards.
    with whole_weights() if is_fsdp() else nullcontext():
        with explained(recipe, "loading"):
            model = load_for_run(recipe, source)
        fingerprint = model_hash(model)
        if checkpoint:
            check_same_start(checkpoint, data, fingerprint)
        if PartialState().is_main_process:
            write_records(recipe, data, fingerprint)
        with running(model):
            sets = give_guidance(recipe, sets, model, evaluation.processing_class)
            evaluation.begin(model, source, fingerprint)
    if is_fsdp():
        model = load_for_run(recipe, source)
    trainer, guard = build_trainer(recipe, model, evaluation.processing_class, sets, probes, bias_probe)
    trainer.known_weights = fingerprint
    interrupts = Interrupts()
    trainer.add_callback(interrupts)
    try:
        with interrupts.deferred(), explained(recipe, "training"):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(Path(output_dir) / STATE_FILE))
    with explained(recipe, "saving"):
        trainer.save_model()
    if trainer.saliency_mask is not None and trainer.is_world_process_zero():
        evaluation.saliency = write_mask_report(recipe, trainer, output_dir)
    history, model = trainer.state.log_history, trainer.model
    if is_fsdp():
        # What was saved is measured: no process holds the trained weights whole.
        del trainer, model
        with whole_weights():
            model = load_for_run(recipe, output_dir)
    try:
        evaluation.measure("after", model, output_dir)
    except ValueError as err:
        raise RecipeError([*guard.messages, str(err)], f"the model after unlearning, saved in {output_dir},") from err
    return history, guard.messages


def build_trainer(
    recipe: Recipe,
    model: torch.nn.Module,
    processing_class: Any,
    sets: Mapping[str, Any],
    probes: Sequence[Any],
    bias_probe: Any | None,
) -> tuple[Any, CollapseGuard]:
    """The recipe's trainer with its callbacks.

    Args:
        recipe: with its testbed resolved.
        model: the one to unlearn.
        processing_class: its tokenizer or processor.
        sets: rows by stream.
        probes: evaluations during training.
        bias_probe: the one that steers it, if any.

    Raises:
        RecipeError: where model, settings and data do not go together.
    """
    run_config = recipe.run
    set_seed(recipe.training.seed)  # the adapter's first weights are drawn before the Trainer sets its seed
    try:
        steering = {}
        if bias_probe is not None:
            steering["bias_probe"] = StereoSetProbe(
                bias_probe, processing_class, run_config.eval_batch_size, run_config.share_prefixes
            )
        trainer = recipe.trainer_class(
            model=model,
            args=recipe.training,
            processing_class=processing_class,
            peft_config=get_peft_config(recipe.model),
            **{f"{stream}_dataset": rows for stream, rows in sets.items()},
            **steering,
        )
    except ValueError as err:
        raise RecipeError([str(err)], recipe.source) from err
    guard = CollapseGuard(
        run_config.guard_min_retained,
        run_config.guard_max_loss,
        run_config.guard_action,
        run_config.guard_max_perplexity,
        run_config.guard_max_grad_growth,
    )
    trainer.add_callback(guard)
    if probes:
        batches = (run_config.eval_batch_size, run_config.share_prefixes)
        trainer.add_callback(ProbeCallback(trainer, probes, recipe.training.probe_steps, *batches))
    return trainer, guard


def _what_was_done(recipe: Recipe) -> str:
    adapter = recipe.run.transfer_adapter_from
    return f"Weight transfer, no training: {public_name(adapter)} on" if adapter else f"{recipe.run.method} on"


def _report(
    recipe: Recipe, evaluation: _Evaluation, history: list[dict], messages: Sequence[str], seconds: float
) -> None:
    """Writes the report and prints what a person reads first."""
    output_dir, testbed = Path(recipe.training.output_dir), recipe.run.testbed
    model = f"planted {testbed}" if testbed else public_name(recipe.model.model_name_or_path)
    results = {name: result.to_dict() for name, result in evaluation.results.items()}
    report = write_report(
        output_dir,
        results,
        history=history,
        items=evaluation.items,
        cases=case_candidates(evaluation.tasks, evaluation.items),
        title=f"{_what_was_done(recipe)} {model}",
        seconds=seconds,
        num_cases=recipe.run.case_studies,
        seed=recipe.training.seed,
    )
    if evaluation.saliency is not None:
        add_to_report(report, evaluation.saliency)
    note_measured(output_dir)
    log_results(recipe, results, report.with_name(FIGURE_FILE))
    print(terminal_table(results))
    for sentence in [*messages, *verdicts(results)]:
        print(f"- {sentence}")
    print(f"Report {report}, results {output_dir / RESULTS_FILE}, model {output_dir} ({seconds:.0f} s)")
    shutil.rmtree(output_dir / RECORDS_FOLDER, ignore_errors=True)
