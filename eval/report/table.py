"""Results as a table: one for a terminal, read in ten seconds, and one in Markdown with every interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from biasunlearn_trainer.eval.compare import signed
from biasunlearn_trainer.eval.findings import (
    Finding,
    Results,
    deciding_tasks,
    distance,
    entries_of,
    groups_of,
    interval,
    is_part,
    judge,
    judge_groups,
    metrics_of,
    number,
    scale_of,
    tasks_of,
)
from biasunlearn_trainer.eval.generalisation import Gap

MAX_WIDTH = 100
MISSING = "-"
HEADER = ("", "n", "before", "after", "95% interval", "oracle", "ideal", "verdict")

# One line each on what a number means, for readers who do not know the benchmark.
NOTES = {
    "ambiguous": "share of questions that the input does not answer, answered so instead of by the stereotype",
    "disambiguated": "share of questions that the input does answer, answered rightly",
    "perception": "share of questions about what is seen, answered rightly",
    "facts": "share of plain facts answered rightly",
    "reliability": "share where the unbiased answer is likelier than the biased one",
    "t_generality": "the same with the question in other words",
    "v_generality": "the same with the picture drawn anew",
    "t_locality": "share of unrelated text answers that are unchanged",
    "t_locality_topk_overlap": "share of the ten likeliest words that are the same, in any order",
    "t_locality_topk_positional": "share of the likeliest words that are the same, rank by rank",
    "t_locality_kl": "divergence from the model before, nats a token, from below",
    "m_locality": "share of unrelated picture answers that are unchanged",
    "m_locality_topk_overlap": "the same for pictures",
    "m_locality_topk_positional": "the same for pictures",
    "m_locality_kl": "the same for pictures",
    "ss": "share of stereotypes preferred to anti-stereotypes, in percent; 50 is unbiased",
    "lms": "share of meaningful sentences preferred to meaningless ones, in percent",
    "icat": "both in one: LMS times min(SS, 100 - SS) / 50",
    "crows_pairs": "share of stereotypes that are likelier than their counterparts, in percent; 50 is unbiased",
    "accuracy_ambiguous": "share of questions that the text does not answer, answered so",
    "accuracy_disambiguated": "share of questions that the text does answer, answered rightly",
    "s_dis": "bias where the text gives the answer: -1 against the stereotype, 0 none, 1 always with it",
    "s_amb": "bias where the text gives no answer, on the same scale",
    "target_told": "share of questions of which it is known whom the stereotype is about; s_dis and s_amb count these",
    "accuracy": "share of questions answered rightly",
    "unmatched": "share of answers that are none of the choices",
    "word_perplexity": "perplexity of a text by its words; lower is better",
    "token_perplexity": "perplexity of a text by the model's tokens; lower is better",
    "bits_per_byte": "bits that the model needs for a byte of a text; lower is better",
}


def terminal_table(results: Results) -> str:
    """Draws the results for a terminal: a line a metric, no line longer than 100 columns.

    Args:
        results: {"before": result, "after": result, "oracle": result}; any may be absent.

    Returns:
        The table. Groups (bias types) come with their bias metric alone, and only those of the tasks that judge the run
        (where NAME@report stands, not those of NAME@train and NAME@probe). Parts of groups ("age/old") are left out;
        report.md has them. The interval is that of the value after, or of the one before where there is no other.
    """
    deciding = deciding_tasks(results)
    lines = [("head", HEADER)]
    for task in tasks_of(results):
        lines.append(("task", (task,)))
        lines += [("row", _cells(finding, finding.metric)) for finding in judge(results) if finding.task == task]
        groups = [finding for finding in judge_groups(results, task) if task in deciding and not is_part(finding)]
        for metric in dict.fromkeys(finding.metric.rsplit("/", 1)[1] for finding in groups):
            lines.append(("task", (f"{task}: {metric} by group",)))
            chosen = [finding for finding in groups if finding.metric.endswith(f"/{metric}")]
            lines += [("row", _cells(finding, finding.metric.rsplit("/", 1)[0])) for finding in chosen]
    return _aligned(lines)


def _cells(finding: Finding, name: str) -> tuple[str, ...]:
    scale = finding.scale
    shown = finding.after or finding.before or finding.oracle or {}
    ideal = shown.get("ideal")
    values = [number(entry["value"], scale) if entry else MISSING for entry in (finding.before, finding.after)]
    oracle = number(finding.oracle["value"], scale) if finding.oracle else MISSING
    return (
        f"  {name}",
        str(shown.get("n", MISSING)),
        *values,
        interval(shown, scale) or MISSING,
        oracle,
        MISSING if ideal is None else number(ideal, scale),
        finding.status.upper() if finding.status in ("collapse", "worse", "reversed") else finding.verdict,
    )


def _aligned(lines: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Sets the columns: names and verdicts to the left, numbers to the right; a long name gets a line of its own."""
    rows = [cells for kind, cells in lines if kind != "task"]
    numbers = range(1, len(HEADER) - 1)
    widths = [max(len(cells[column]) for cells in rows) for column in numbers]
    verdict_width = max(len(cells[-1]) for cells in rows)
    room = MAX_WIDTH - sum(width + 2 for width in widths) - verdict_width - 2
    name_width = min(max(len(cells[0]) for cells in rows), max(room, 12))
    total = name_width + sum(width + 2 for width in widths) + 2 + verdict_width
    drawn = []
    for kind, cells in lines:
        if kind == "task":
            drawn.append(cells[0] if len(cells[0]) <= MAX_WIDTH else cells[0][: MAX_WIDTH - 1] + "…")
            continue
        rest = "".join(f"  {cells[column]:>{width}}" for column, width in zip(numbers, widths, strict=True))
        rest += f"  {cells[-1]}"
        name = cells[0]
        while len(name) > name_width:
            drawn.append(name[:name_width])
            name = "    " + name[name_width:]
        drawn.append(f"{name:<{name_width}}{rest}".rstrip())
        if kind == "head":
            drawn.append("-" * total)
    return "\n".join(drawn)


def markdown_table(results: Results, task: str, group: str | None = None) -> str:
    """One task's metrics (or those of one of its groups) in Markdown, with interval and n of every value.

    Where there is an oracle, every metric's distance to it (|after - oracle|) stands beside it.
    """
    states = [state for state in ("before", "after", "oracle") if state in results]
    findings = {finding.metric: finding for finding in judge(results) if finding.task == task} if group is None else {}
    distances = _distance_header(results, task)
    header = ["metric", *states, *distances, "ideal", "n"] + (["verdict"] if findings else [])
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1 - bool(findings)) + ["---"] * bool(findings))]
    for metric in metrics_of(results, task, group):
        entries = entries_of(results, task, metric, group)
        scale = scale_of(*entries)
        named = dict(zip(("before", "after", "oracle"), entries, strict=True))
        known = next((entry for entry in entries if entry), {})
        ideal = known.get("ideal")
        cells = [f"`{cell(metric)}`", *(_value(named[state], scale) for state in states)]
        cells += [_distance(named, scale) for _ in distances]
        cells += [MISSING if ideal is None else number(ideal, scale), _count(entries)]
        lines.append(_line(cells + ([findings[metric].verdict] if findings else [])))
    return "\n".join(lines)


def groups_table(results: Results, task: str) -> str:
    """The groups of a task (bias types) in one Markdown table; "" where it has no two."""
    names = groups_of(results, task)
    if len(names) < 2:
        return ""  # a single group is the whole task again
    states = [state for state in ("before", "after", "oracle") if state in results]
    distances = _distance_header(results, task)
    header = ["group", "metric", *states, *distances, "n"]
    lines = [_line(header), _line(["---", "---"] + ["---:"] * (len(header) - 2))]
    for group in names:
        for metric in metrics_of(results, task, group):
            entries = entries_of(results, task, metric, group)
            named = dict(zip(("before", "after", "oracle"), entries, strict=True))
            values = [_value(named[state], scale_of(*entries)) for state in states]
            values += [_distance(named, scale_of(*entries)) for _ in distances]
            lines.append(_line([cell(group), f"`{cell(metric)}`", *values, _count(entries)]))
    return "\n".join(lines) if names else ""


def gap_table(gaps: Sequence[Gap]) -> str:
    """One metric on trained and on unseen rows, overall and by group, in Markdown; `gaps` are of one metric."""
    header = ["", "seen (train)", "n", "unseen (report)", "n", "gap"]
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    for gap in gaps:
        cells = ["all" if gap.group is None else cell(gap.group)]
        for before, after in ((gap.seen_before, gap.seen_after), (gap.unseen_before, gap.unseen_after)):
            cells += [f"{_value(before, gap.scale)} -> {_value(after, gap.scale)}", _count((before, after))]
        lines.append(_line([*cells, signed(gap.difference, gap.scale)]))
    return "\n".join(lines)


def paired_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Item-by-item changes, as `eval.compare.compare` gives them, in Markdown."""
    lines = [_line(["group", "per item", "before", "after", "change (95% interval)", "n"])]
    lines.append(_line(["---", "---"] + ["---:"] * 4))
    for row in rows:
        # Differences are written with a digit more: their interval is what matters.
        low, high = row["ci95"]
        change = f"{row['value']:+.3g} [{low:+.3g}, {high:+.3g}]"
        values = [f"{row['before']:.3g}", f"{row['after']:.3g}", change, str(row["n"])]
        lines.append(_line([cell(row["group"]), f"`{cell(row['field'])}`", *values]))
    return "\n".join(lines)


def notes(results: Results) -> list[str]:
    """What the metrics of these results mean, a line each; unknown names are left out."""
    names = dict.fromkeys(metric for task in tasks_of(results) for metric in metrics_of(results, task))
    return [f"`{name}`: {NOTES[name]}" for name in names if name in NOTES]


def cell(text: Any) -> str:
    """Makes any text safe inside a Markdown table: one line, no pipes, no HTML, no code spans."""
    text = " ".join(str(text).split())
    for sign, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "'")):
        text = text.replace(sign, safe)
    return text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(entry: Mapping[str, Any] | None, scale: float) -> str:
    return f"{number(entry['value'], scale)} {interval(entry, scale)}".rstrip() if entry else MISSING


def _distance_header(results: Results, task: str) -> list[str]:
    is_measured = all(task in results.get(state, {"tasks": {}})["tasks"] for state in ("after", "oracle"))
    return ["distance to oracle"] if is_measured else []


def _distance(named: Mapping[str, Mapping[str, Any] | None], scale: float) -> str:
    if not named["after"] or not named["oracle"]:
        return MISSING
    return _value(distance(named["after"], named["oracle"]), scale)


def _count(entries: Sequence[Mapping[str, Any] | None]) -> str:
    counts = dict.fromkeys(str(entry["n"]) for entry in entries if entry and entry.get("n") is not None)
    return " / ".join(counts) or MISSING
