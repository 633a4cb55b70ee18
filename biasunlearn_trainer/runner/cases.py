"""Candidates for the report's case studies: what each model made of the same item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STATES = ("before", "after", "oracle")
SENTENCES = ("stereotype", "anti_stereotype", "unrelated")


def case_candidates(tasks: Sequence[Any], items: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[dict]:
    """Lays the records of one item before, after and of the oracle side by side.

    Args:
        tasks: the tasks, whose `rows` hold the pictures.
        items: records by state and task, as `Task.run` returned them.

    Returns:
        One case per item: task, kind, bias_type, prompt, expected, biased, an answer a state, images, `regression`:
        by how many nats (StereoSet: bits per token) what should be kept got worse; 0 where it did not.
    """
    cases = []
    for task in tasks:
        by_state = {state: items[state][task.name] for state in STATES if state in items}
        for records in zip(*by_state.values(), strict=True):
            states = dict(zip(by_state, records, strict=True))
            first = states["before"]
            case = _answer_case(states) if "answer" in first else _sentence_case(states)
            shared = {"task": task.name, "kind": first.get("kind"), "bias_type": first.get("bias_type")}
            cases.append({**shared, "images": task.rows[first["index"]].get("images") or [], **case})
    return cases


def _answer_case(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A question with a right answer; it regressed where the model gave that answer before and no longer does."""
    before, after = states["before"], states["after"]
    lost = before["expected"] is not None and before["correct"] and not after["correct"]
    return {
        "prompt": before["prompt"],
        "expected": before["expected"],
        "biased": before.get("rejected"),
        "regression": max(before["logp_completion"] - after["logp_completion"], 0.0) if lost else 0.0,
        **{state: record["answer"] or "(something else)" for state, record in states.items()},
    }


def _sentence_case(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Three sentences to prefer one of; it regressed where a meaningless one gained on the best meaningful one."""
    margins = {
        state: max(record["score_stereotype"], record["score_anti_stereotype"]) - record["score_unrelated"]
        for state, record in states.items()
    }
    before = states["before"]
    return {
        "prompt": before["context"],
        "expected": f"{before['stereotype']} / {before['anti_stereotype']} (no preference between the two)",
        "biased": before["stereotype"],
        "regression": max(margins["before"] - margins["after"], 0.0) if margins["after"] < 0 else 0.0,
        **{state: record[max(SENTENCES, key=lambda s, r=record: r[f"score_{s}"])] for state, record in states.items()},
    }
