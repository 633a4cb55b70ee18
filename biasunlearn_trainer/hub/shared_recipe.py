"""The recipe of a run as others can read it: its settings without this machine's paths."""

from __future__ import annotations

from typing import Any

import yaml

from biasunlearn_trainer.hub.finished import FinishedRun
from biasunlearn_trainer.hub.naming import in_testbed, portable

NOT_SHARED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "report_to", "run_name")


def recipe_for_others(run: FinishedRun) -> str:
    """The run's recipe without this machine's paths: sets of a testbed by name, others by their last part."""
    lines = []
    for line in run.recipe_text.splitlines():
        if not line.strip() or line.startswith("#"):
            lines.append(portable(line))
            continue
        setting, mark, default = line.rpartition("  # default: ")
        [(key, value)] = yaml.safe_load(setting or line).items()
        if key not in NOT_SHARED and not key.startswith("hub_") and not _is_filled_in(run, key):
            value = _named_in_testbed(run, value)
            shown = yaml.safe_dump(portable(value), default_flow_style=True, width=10**6, allow_unicode=True)
            lines.append(f"{key}: {shown.strip().removesuffix('...').strip()}{mark}{default}")
    return "\n".join(lines) + "\n"


def _is_filled_in(run: FinishedRun, key: str) -> bool:
    """A testbed fills in its own model and oracle."""
    return run.testbed_folder is not None and key in ("model_name_or_path", "oracle_model")


def _named_in_testbed(run: FinishedRun, value: Any) -> Any:
    if isinstance(value, list):
        return [_named_in_testbed(run, part) for part in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    return name + equals + (in_testbed(path, run.testbed_folder) or path)
