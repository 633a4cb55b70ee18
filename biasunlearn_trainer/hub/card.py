"""The model card of a run: what was done to which model with which sets, and what was measured.

Its numbers are those of results.json, shortened to the digits that their scale deserves; nothing is measured, joined or
averaged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from biasunlearn_trainer.eval.compare import verdicts
from biasunlearn_trainer.eval.findings import groups_of, tasks_of
from biasunlearn_trainer.eval.report.table import cell, groups_table, markdown_table, notes
from biasunlearn_trainer.hub.card_sets import hub_sets, sets_section
from biasunlearn_trainer.hub.card_usage import base_name, pipeline_tag, usage
from biasunlearn_trainer.hub.finished import FinishedRun
from biasunlearn_trainer.hub.licences import benchmark_of
from biasunlearn_trainer.hub.methods import METHODS, TRANSFER, Method
from biasunlearn_trainer.hub.naming import is_hub_id, portable, public_name
from biasunlearn_trainer.run_files import FIGURE_FILE, RESULTS_FILE
from biasunlearn_trainer.version import __version__

TAGS = ["biasunlearn_trainer", "machine-unlearning", "bias-mitigation"]
SETTINGS = (
    "preset",
    "beta",
    "delta",
    "retain_loss",
    "forget_weight",
    "retain_weight",
    "utility_weight",
    "guidance_weight",
    "saliency_mask",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "bf16",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "seed",
)
"""Keys of a recipe that a reader looks for first; the whole recipe lies beside the card."""
LIMITS = """\
For research on social bias and unlearning, and as a starting point that you measure again for your own use. Not for
decisions about people.

- A number says what the rows of its task say, in their language, wordings and pictures. A bias that no row asks about
  was not measured, and may be there as before.
- Unlearning makes an association less likely; it does not prove that it is gone from the weights. Further training may
  bring it back{undone}.
- The training and evaluation rows contain stereotypes on purpose.
- What else the base model does, right or wrong, it still does: its own card and licence hold."""


def write_card(
    run: FinishedRun,
    name: str,
    *,
    kind: str = "adapter",
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    method: str | None = None,
) -> ModelCard:
    """The card of a run.

    Args:
        run: what `read_run` returned.
        name: the repository, OWNER/NAME, or what the model is to be called.
        kind: `adapter`, `merged` (an adapter in its base) or `model` (fine-tuned whole).
        base_model: the base's Hub id, where the run read it from somewhere else.
        license: the Hub's name of the licence that the weights are published under.
        language: language codes of the texts.
        tags: more tags.
        method: the method, where no recipe says it.
    """
    base = base_model or run.base
    method = run.recipe.get("method") or method
    data = _metadata(run, name, kind, base, method, tags)
    data.license, data.language = license, language
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        _opening(run, kind, base, method),
        _in_short(run),
        "## Use it\n\n" + usage(run, name, kind, base),
        "## What was done\n\n" + _method(run, method),
        sets_section(run),
        _results(run),
        "## Intended use and limits\n\n" + _limits(run, kind),
        "## Recipe and versions\n\n" + _versions(run),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def _metadata(
    run: FinishedRun, name: str, kind: str, base: str | None, method: str | None, tags: Sequence[str]
) -> ModelCardData:
    results = model_index(run)
    relation = {"adapter": "adapter", "merged": "merge"}.get(kind, "finetune")
    return ModelCardData(
        base_model=base if is_hub_id(base) else None,
        base_model_relation=relation if is_hub_id(base) else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=pipeline_tag(run),
        tags=[*TAGS, *([method] if method else []), *(["lora"] if run.is_adapter else []), *tags],
        datasets=hub_sets(run) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def model_index(run: FinishedRun) -> list[EvalResult]:
    """Every overall metric after unlearning, in full precision, with n, interval and the value before beside it."""
    if "after" not in run.results:
        return []
    before = run.results.get("before")
    entries = []
    for task, result in run.results["after"].tasks.items():
        known = benchmark_of(task)
        for name, metric in result.metrics.items():
            old = before.tasks[task].metrics.get(name) if before and task in before.tasks else None
            args = {"n": metric.n, "ci95": list(metric.ci95), "ideal": metric.ideal}
            if old is not None:
                args["before"] = {"value": old.value, "n": old.n, "ci95": list(old.ci95)}
            entries.append(
                EvalResult(
                    task_type=pipeline_tag(run),
                    dataset_type=task,
                    dataset_name=known[0] if known else task,
                    metric_type=name,
                    metric_value=metric.value,
                    metric_name=f"{name} (after unlearning)",
                    metric_args=args,
                )
            )
    return entries


def _compared(run: FinishedRun) -> dict[str, Any]:
    """Before and after alone: a distance to the oracle would be a number that stands in no file."""
    return {state: run.results[state].to_dict() for state in ("before", "after") if state in run.results}


def _opening(run: FinishedRun, kind: str, base: str | None, method: str | None) -> str:
    what = {
        "adapter": f"A {run.adapter_config.get('peft_type', 'LORA').replace('LORA', 'LoRA')} adapter for",
        "merged": "An adapter merged into the weights of",
        "model": "A fine-tuning of",
    }[kind]
    title = _entry(run, method).title if _entry(run, method) else (method or "a method of its own")
    text = f"{what} {base_name(run, base)}, from which social bias was unlearned with {title}."
    if run.recipe.get("testbed"):
        text += (
            f" The base is a small model of biasunlearn_trainer's testbed `{run.recipe['testbed']}`, into which a bias "
            "of known size was planted: it shows that the method works, and is of no other use."
        )
    if run.is_quantised:
        text += _quantised(kind)
    return text


def _quantised(kind: str) -> str:
    if kind == "merged":
        return (
            " It was trained on a quantised base and merged into the dequantised weights of that one, which are what "
            "was measured; they are not the original ones."
        )
    return " It was trained and measured on a quantised base; on the original weights the numbers may differ a little."


def _in_short(run: FinishedRun) -> str:
    if "after" not in run.results:
        return (
            "**Nothing was measured.** No results were published with these weights: whether the bias went, and what "
            "that cost, is not known."
        )
    return "\n".join(f"- {sentence}" for sentence in verdicts(_compared(run)))


def _entry(run: FinishedRun, method: str | None) -> Method | None:
    return TRANSFER if run.recipe.get("transfer_adapter_from") else METHODS.get(method or "")


def _method(run: FinishedRun, method: str | None) -> str:
    entry = _entry(run, method)
    if entry is None:
        return f"Method `{method or 'unknown'}`, none of biasunlearn_trainer's own; its author knows its equation."
    lines = [
        f"**{entry.title}.** {entry.summary}",
        f"    {entry.equation}",
        f"Source: {entry.paper}, [arXiv {entry.arxiv}](https://arxiv.org/abs/{entry.arxiv}), {entry.place}; as "
        f"implemented in `biasunlearn_trainer`, explained in its `docs/{entry.page}.md`.",
    ]
    if run.recipe.get("transfer_adapter_from"):
        lines.append(f"The adapter was trained as {public_name(run.recipe['transfer_adapter_from'])}.")
    settings = {key: run.recipe[key] for key in SETTINGS if run.recipe.get(key) is not None}
    if settings:
        lines.append("Set by the recipe: " + ", ".join(f"`{k}: {portable(v)}`" for k, v in settings.items()) + ".")
    return "\n\n".join(lines)


def _results(run: FinishedRun) -> str:
    results = _compared(run)
    if "after" not in results:
        return ""
    parts = ["## Results", "Before and after unlearning; brackets hold 95 % intervals, `n` counts the items."]
    for task in tasks_of(results):
        parts += [f"### {cell(task)}", markdown_table(results, task)]
        if groups_of(results, task) and groups_table(results, task):
            parts += ["By group:", groups_table(results, task)]
    parts.append("\n".join(f"- {note}" for note in notes(results)))
    if (run.folder / FIGURE_FILE).is_file():
        parts.append(f"![The run's report]({FIGURE_FILE})")
    parts.append(f"The same numbers unrounded: [{RESULTS_FILE}]({RESULTS_FILE}).")
    return "\n\n".join(part for part in parts if part)


def _limits(run: FinishedRun, kind: str) -> str:
    text = LIMITS.format(undone=", and switching the adapter off does" if kind == "adapter" else "")
    if "after" in run.results:
        groups = {group for task in tasks_of(_compared(run)) for group in groups_of(_compared(run), task)}
        if groups:
            text += "\n- Groups that were measured: " + ", ".join(sorted(cell(group) for group in groups)) + "."
    return text


def _versions(run: FinishedRun) -> str:
    environment = run.environment
    packages = environment.get("packages") or {"biasunlearn_trainer": __version__}
    text = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [f"Made with {text}."]
    if environment:
        lines.append(
            f"Seed {environment.get('seed')}, {environment.get('processes', 1)} process(es), Python "
            f"{environment.get('python')}."
        )
    if run.recipe:
        lines.append(
            "[recipe.resolved.yaml](recipe.resolved.yaml) holds every setting: `accelerate launch recipes/run.py "
            "recipe.resolved.yaml` runs it again, once its sets are where it looks for them."
        )
    return "\n\n".join(lines)
