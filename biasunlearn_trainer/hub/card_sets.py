"""The part of a model card about the sets: what was trained and measured on, and under which licences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from biasunlearn_trainer.eval.report.table import cell
from biasunlearn_trainer.hub.finished import FinishedRun
from biasunlearn_trainer.hub.licences import benchmark_of
from biasunlearn_trainer.hub.naming import in_testbed, is_hub_id, public_name

HEAD = ("used as", "set", "rows", "licence", "fingerprint")
UNKNOWN = "not stated"


def hub_sets(run: FinishedRun) -> list[str]:
    """The Hub ids among the training sets, each once."""
    sources = [part.get("source") for part in run.environment.get("data", {}).values()]
    return list(dict.fromkeys(_repository(source) for source in sources if is_hub_id(source)))


def sets_section(run: FinishedRun) -> str:
    """A table of the sets; "" where none is known."""
    rows = [_trained(run, stream, part) for stream, part in run.environment.get("data", {}).items()]
    rows += [_measured(run, task) for task in (run.results["after"].tasks if "after" in run.results else ())]
    if not rows:
        return ""
    table = "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ("---",) * len(HEAD), *rows))
    return (
        f"## Sets and licences\n\n{table}\n\n"
        "A licence is that of the rows as their publisher states it; what it asks of a model that saw them is for you "
        "to judge."
    )


def _trained(run: FinishedRun, stream: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    source = part["source"]
    if is_hub_id(source):
        name, licence = f"[{source}](https://huggingface.co/datasets/{_repository(source)})", "see its page"
    else:
        name, licence = f"`{cell(in_testbed(source, run.testbed_folder) or public_name(source))}`", UNKNOWN
    known = [f"{cell(s['title'])}: {cell(s.get('licence') or UNKNOWN)}" for s in part.get("sources") or []]
    licence = "; ".join(dict.fromkeys(known)) or licence
    return f"training, {stream}", name, str(part["rows"]), licence, f"`{part['fingerprint']}`"


def _measured(run: FinishedRun, task: str) -> tuple[str, ...]:
    title, licence, url = benchmark_of(task) or ("rows of the publisher's own", None, "")
    name = f"`{cell(task)}`: " + (f"[{title}]({url})" if url else title)
    return "evaluation", name, "`n` below", licence or UNKNOWN, ""


def _repository(source: str) -> str:
    return "/".join(source.split("/")[:2])
