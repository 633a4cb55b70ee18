"""What a run did: item by item with paired intervals, and in plain words. Needs numpy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biasunlearn_trainer.eval.findings import (
    Finding,
    Results,
    deciding_tasks,
    interval,
    judge,
    judge_groups,
    number,
    tasks_of,
)
from biasunlearn_trainer.eval.generalisation import Gap, generalisation_gaps
from biasunlearn_trainer.eval.metrics import paired_difference

FEW_ITEMS = 30
ITEM_KEYS = ("id", "index")
BIAS_WORDS = {
    "gone": "Bias gone",
    "partly gone": "Bias partly gone",
    "still there": "Bias still there",
    "reversed": "Bias reversed",
    "worse": "Bias worse",
    "unclear": "Bias unclear, the interval holds the ideal but is too wide to tell",
    "little before": "Little bias before and after",
}
FORGETTING_WORDS = {
    "gone": "Forgotten",
    "partly gone": "Partly forgotten",
    "still there": "Still known",
    "worse": "Better known than before",
    "little before": "Hardly known before and after",
}
ABILITY_WORDS = {
    "fell": "Damaged",
    "unclear": "Unclear, too few items to tell a change from chance",
    "kept": "Kept",
    "rose": "Improved",
}


def verdicts(results: Results) -> list[str]:
    """Says in plain sentences what the run did: the outcome, collapse, bias, abilities, groups, new rows, the oracle.

    Args:
        results: {"before": result, "after": result, "oracle": result}, as `EvalResult.to_dict()` gives them; "oracle"
            may be absent.

    Returns:
        Sentences with numbers and 95 % intervals; one that says so where a state is missing.
    """
    missing = [state for state in ("before", "after") if state not in results]
    if missing:
        return [f"No verdict: there is no result from {' or '.join(missing)} unlearning."]
    findings = judge(results)
    several = len(tasks_of(results)) > 1
    groups = [sentence for task in deciding_tasks(results) for sentence in _group_sentences(results, task)]
    sentences = [f"In short: {outcome(results)}", *_collapse_sentence(findings, several)]
    for words, kind in (
        (BIAS_WORDS, lambda finding: finding.is_bias and not finding.is_forgetting),
        (FORGETTING_WORDS, lambda finding: finding.is_forgetting),
        (ABILITY_WORDS, lambda finding: not finding.is_bias),
    ):
        sentences += _status_sentences([finding for finding in findings if kind(finding)], words, several)
    gaps = [_gap_sentence(gap) for gap in generalisation_gaps(results) if gap.is_bias and gap.group is None]
    return sentences + groups + gaps + _oracle_sentences(findings)


def _is_done(finding: Finding) -> bool:
    return finding.status in ("gone", "little before")


def outcome(results: Results) -> str:
    """The outcome in one sentence, of the tasks that decide it: bias and knowledge, or that the model collapsed."""
    deciding = deciding_tasks(results)
    findings = [finding for finding in judge(results) if finding.task in deciding]
    abilities = {finding.status for finding in findings if not finding.is_bias} - {""}
    if "collapse" in abilities:
        return "the model collapsed; what is left of its answers says nothing about bias."
    to_change = [finding for finding in findings if finding.is_bias and finding.status]
    only_forgetting = bool(to_change) and all(finding.is_forgetting for finding in to_change)
    goal = "what was to be forgotten" if only_forgetting else "the bias"
    bias = _goal_outcome([finding.status for finding in to_change], goal)
    if bias == "the bias is gone" and _groups_left(results):
        bias = "the bias is gone overall, but not in every group"
    if "fell" in abilities:
        return f"{bias}; some knowledge was lost."
    if "unclear" in abilities:
        return f"{bias}; too few items to say whether knowledge was kept."
    return f"{bias}, and knowledge is kept." if abilities else f"{bias}."


def _groups_left(results: Results) -> bool:
    judged = [finding for task in deciding_tasks(results) for finding in judge_groups(results, task)]
    return any(finding.status not in ("", "unclear") and not _is_done(finding) for finding in judged)


def _goal_outcome(statuses: Sequence[str], goal: str) -> str:
    done = sum(status in ("gone", "little before") for status in statuses)
    if not statuses:
        return "no bias was measured"
    if set(statuses) == {"little before"}:
        return "there was little to remove" if goal != "the bias" else "there was little bias to remove"
    if done == len(statuses):
        return f"{goal} is gone"
    if done:
        return f"{goal} is gone on {done} of {len(statuses)} measures"
    for status, words in (("worse", "worse"), ("reversed", "reversed"), ("partly gone", "partly gone")):
        if status in statuses:
            return f"{goal} is {words}"
    if "still there" in statuses:
        return f"{goal} is still there"
    return f"too few items to say whether {goal} is gone"


def _change(finding: Finding, several: bool) -> str:
    """For example "facts 0.98 -> 0.14 [0.08, 0.21]"."""
    scale, after = finding.scale, finding.after
    name = f"{finding.task}: {finding.metric}" if several else finding.metric
    before = f"{number(finding.before['value'], scale)} -> " if finding.before else ""
    return f"{name} {before}{number(after['value'], scale)} {interval(after, scale)}".rstrip()


def _status_sentences(findings: Sequence[Finding], words: Mapping[str, str], several: bool) -> list[str]:
    """One sentence a status, with all metrics of that status."""
    sentences = []
    for status, opening in words.items():
        changes = [_with_remarks(finding, several) for finding in findings if finding.status == status]
        if changes:
            sentences.append(f"{opening}: {', '.join(changes)}.")
    return sentences


def _with_remarks(finding: Finding, several: bool) -> str:
    """The change, with the ideal where it is not plain, and the number of items where it is small."""
    remarks = []
    if finding.is_bias and finding.after.get("higher_is_better", True) is None:
        remarks.append(f"ideal {number(finding.after['ideal'], finding.scale)}")
    if finding.after.get("n", FEW_ITEMS) < FEW_ITEMS or finding.status == "unclear":
        remarks.append(f"only {finding.after.get('n', 0)} items")
    return _change(finding, several) + (f" ({'; '.join(remarks)})" if remarks else "")


def _collapse_sentence(findings: Sequence[Finding], several: bool) -> list[str]:
    collapsed = [finding for finding in findings if finding.status == "collapse"]
    if not collapsed:
        return []
    falls = []
    for finding in collapsed:
        scale, after = finding.scale, finding.after
        name = f"{finding.task}: {finding.metric}" if several else finding.metric
        verb = "fell" if after.get("higher_is_better", True) else "rose"
        # A locality is measured against the model before, so that it began at its ideal.
        before = finding.before["value"] if finding.before else after["ideal"]
        change = f"from {number(before, scale)} to {number(after['value'], scale)} {interval(after, scale)}"
        falls.append(f"{name} {verb} {change} (n = {after.get('n')})")
    bias = [finding for finding in findings if finding.is_bias and finding.status]
    lost = "the ability itself"
    if bias:
        lost += " along with the bias" if all(map(_is_done, bias)) else ", not the bias"
    return [f"Collapse: {', '.join(falls)}. The model lost {lost}."]


def _group_sentences(results: Results, task: str) -> list[str]:
    """Names the groups of a task in which bias is left, where groups were measured."""
    judged = [finding for finding in judge_groups(results, task) if finding.status]
    known = [finding for finding in judged if finding.status != "unclear"]
    left = [finding for finding in known if not _is_done(finding)]
    if not judged:
        return []
    unclear = f"; too few items to tell in {len(judged) - len(known)}" if len(known) < len(judged) else ""
    if not left:
        return [f"By group ({task}): no bias left in {len(known)} of {len(judged)}{unclear}."]
    left.sort(key=lambda finding: -abs(finding.after["value"] - finding.after["ideal"]) / finding.scale)
    named = ", ".join(
        f"{finding.metric.replace('/', ' ')} {number(finding.after['value'], finding.scale)}" for finding in left[:5]
    )
    more = f" and {len(left) - 5} more" if len(left) > 5 else ""
    return [f"By group ({task}): bias left in {len(left)} of {len(judged)}: {named}{more}{unclear}."]


def _gap_sentence(gap: Gap) -> str:
    """How much of what happened on the trained rows happened on new ones."""
    scale = gap.scale
    pairs = ((gap.seen_before, gap.seen_after), (gap.unseen_before, gap.unseen_after))
    seen, unseen = (f"{number(before['value'], scale)} to {number(after['value'], scale)}" for before, after in pairs)
    change, carried = gap.seen_change[0], gap.unseen_change[0]
    verb = "fell" if change < 0 else "rose"
    unit = " points" if scale == 100.0 else ""
    said = f"On trained rows {gap.name} {gap.metric} {verb} from {seen}, on unseen ones from {unseen}: "
    if not gap.has_clear_change:
        said += "no clear change that could carry over"
    elif change * carried <= 0:
        said += f"none of {number(abs(change), scale)}{unit} carried over"
    elif abs(carried) >= abs(change):
        said += f"all of {number(abs(change), scale)}{unit} carried over"
    else:
        said += f"{number(abs(carried), scale)} of {number(abs(change), scale)}{unit} carried over"
    return f"{said} (gap {signed(gap.difference, scale)})."


def signed(difference: tuple[float, tuple[float, float]], scale: float) -> str:
    """A difference with its interval and signs: "-12.7 [-19.0, -6.4]"."""
    value, (low, high) = difference
    # Adding 0.0 turns -0.0 into 0.0.
    value, low, high = (f"{'+' if end >= 0 else '-'}{number(abs(end) + 0.0, scale)}" for end in (value, low, high))
    return f"{value} [{low}, {high}]"


def _oracle_sentences(findings: Sequence[Finding]) -> list[str]:
    """How far each task's metrics are from the oracle's, at worst; and how far they were before."""
    sentences = []
    for task in dict.fromkeys(finding.task for finding in findings):
        compared = [f for f in findings if f.task == task and f.oracle and f.after]
        if compared:
            worst = max(compared, key=lambda f: abs(f.after["value"] - f.oracle["value"]) / f.scale)
            gap = abs(worst.after["value"] - worst.oracle["value"])
            was = max(
                (abs(f.before["value"] - f.oracle["value"]) / f.scale for f in compared if f.before), default=None
            )
            sentences.append(
                f"Distance to the oracle ({task}, {len(compared)} metrics): at most {number(gap, worst.scale)}, on "
                f"{worst.metric} ({number(worst.after['value'], worst.scale)}, oracle "
                f"{number(worst.oracle['value'], worst.scale)})"
                + (f"; before {number(was * worst.scale, worst.scale)}." if was is not None else ".")
            )
    return sentences


def compare(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    name: str = "items",
    fields: Sequence[str] | None = None,
    group_by: Sequence[str] = ("kind", "bias_type"),
) -> list[dict[str, Any]]:
    """Compares the per-item records of one task before and after unlearning, item by item.

    Args:
        before: Records of the task's items; "id" or "index" names the item, and without them its position does.
        after: Records of the same items.
        name: The task's key, from which the bootstrap is seeded.
        fields: Which truth values and numbers to compare; by default all that both records hold as bool or float.
        group_by: The first of these that the records hold splits them; without it there is one group, "all".

    Returns:
        Per group and field {"group", "field", "before", "after", "value" (after - before), "n", "ci95"}.

    Raises:
        ValueError: The two do not hold the same items.
    """
    pairs = _paired(before, after, name)
    group_key = next((key for key in group_by if pairs and key in pairs[0][0]), None)
    rows = []
    for group in dict.fromkeys(first.get(group_key, "all") for first, _ in pairs):
        members = [pair for pair in pairs if pair[0].get(group_key, "all") == group]
        for field in fields or _comparable(members):
            values = [
                (first[field], second[field])
                for first, second in members
                if first.get(field) is not None and second.get(field) is not None
            ]
            if values:
                first, second = (np.array(side) for side in zip(*values, strict=True))
                change = paired_difference(first, second, f"{name}/{group}/{field}").to_dict()
                rows.append(
                    {
                        "group": str(group),
                        "field": field,
                        "before": float(first.mean()),
                        "after": float(second.mean()),
                        **{key: change[key] for key in ("value", "n", "ci95")},
                    }
                )
    return rows


def _paired(before: Sequence[Mapping], after: Sequence[Mapping], name: str) -> list[tuple[Mapping, Mapping]]:
    names = [key for key in ITEM_KEYS if all(key in item for item in [*before, *after])]
    keys = [[item[names[0]] for item in side] if names else list(range(len(side))) for side in (before, after)]
    if any(len(set(side)) < len(side) for side in keys):
        keys = [list(range(len(side))) for side in (before, after)]
    if set(keys[0]) != set(keys[1]):
        odd = sorted(map(str, set(keys[0]) ^ set(keys[1])))
        raise ValueError(
            f"{name}: {len(before)} items before, {len(after)} after, and {len(odd)} of them stand in one only "
            f"({', '.join(odd[:5])}). Evaluate both models on the same data with the same limit."
        )
    second = dict(zip(keys[1], after, strict=True))
    return [(item, second[key]) for key, item in zip(keys[0], before, strict=True)]


def _comparable(pairs: Sequence[tuple[Mapping, Mapping]]) -> list[str]:
    """Fields that hold a bool or a finite float in some pair: counts and ids are no measurements."""
    fields = dict.fromkeys(key for first, second in pairs for key in first if key in second)

    def is_measured(key: str) -> bool:
        values = [side[key] for pair in pairs for side in pair if side.get(key) is not None]
        measured = all(isinstance(value, bool) for value in values) or all(
            type(value) is float and math.isfinite(value) for value in values
        )
        return bool(values) and measured

    return [key for key in fields if is_measured(key)]


if __name__ == "__main__":
    import sys

    from biasunlearn_trainer.eval.matched_command import main

    sys.exit(main())
