"""The part of a model card that says what the model is, where its base is to be had and how to load it."""

from __future__ import annotations

from biasunlearn_trainer.hub.finished import FinishedRun
from biasunlearn_trainer.hub.naming import is_hub_id, public_name


def pipeline_tag(run: FinishedRun) -> str:
    """What the Hub calls the model's task: an image-text model saves an image processor."""
    pictured = ("processor_config.json", "preprocessor_config.json")
    return "image-text-to-text" if any((run.folder / name).is_file() for name in pictured) else "text-generation"


def base_name(run: FinishedRun, base: str | None) -> str:
    """The base as a reader may look for it; what is on no Hub is said to be so."""
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    if run.recipe.get("testbed"):
        return f"the planted `{run.recipe['testbed']}` model"
    fingerprint = run.environment.get("model", {}).get("fingerprint")
    marked = f" (fingerprint of its weights: `{fingerprint}`)" if fingerprint else ""
    return f"`{public_name(base) or 'an unnamed model'}`, a model on the trainer's own disk and not on the Hub{marked}"


def usage(run: FinishedRun, name: str, kind: str, base: str | None) -> str:
    """The lines that load the model with plain transformers and peft."""
    pictured = pipeline_tag(run) == "image-text-to-text"
    model, processor = (
        ("AutoModelForImageTextToText", "AutoProcessor")
        if pictured
        else (
            "AutoModelForCausalLM",
            "AutoTokenizer",
        )
    )
    imports = f"from transformers import {model}, {processor}"
    if kind == "adapter":
        source = f'"{base}"' if is_hub_id(base) else "PATH_OF_THE_BASE"
        code = [
            imports.replace("from transformers", "from peft import PeftModel\nfrom transformers"),
            "",
            f'base = {model}.from_pretrained({source}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{name}")',
            f'processor = {processor}.from_pretrained("{name}")',
        ]
    else:
        code = [
            imports,
            "",
            f'model = {model}.from_pretrained("{name}", dtype="auto")',
            f'processor = {processor}.from_pretrained("{name}")',
        ]
    text = "```python\n" + "\n".join(code) + "\n```"
    if kind == "adapter" and not is_hub_id(base):
        where = (
            f"The base comes from `biasunlearn_trainer.testbed`: `python -m biasunlearn_trainer.testbed "
            f"{run.recipe['testbed']}` builds it and says where it lies."
            if run.recipe.get("testbed")
            else "The base is not on the Hub: the adapter is of use only to those who have the very same weights, and "
            "`adapter_config.json` names none."
        )
        text += f"\n\n{where}"
    return text
