"""About ten cases with questions and answers before and after: the worst regressions, and seeded others."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from biasunlearn_trainer.eval.report.table import MISSING, cell

NUM_CASES = 10
NUM_WORST = 4
# Longest side of a saved picture: large enough to see, small enough for a report.
MAX_SIDE = 512
MIN_SIDE = 128

Case = Mapping[str, Any]


def select_cases(
    cases: Sequence[Case], num_cases: int = NUM_CASES, num_worst: int = NUM_WORST, seed: int = 0
) -> list[dict]:
    """Chooses the cases that a reader sees.

    Args:
        cases: Candidates. A case's `regression` says by how much it got worse (larger is worse; at most 0: it did not).
        num_cases: How many to choose.
        num_worst: How many of them at most are the largest regressions.
        seed: Seed of the others, which are dealt evenly over the tasks and kinds.

    Returns:
        The worst regressions, worst first, then the others; each with "why", "regression" or "drawn".
    """
    numbered = list(enumerate(cases))
    worse = [pair for pair in numbered if (pair[1].get("regression") or 0) > 0]
    worst = sorted(worse, key=lambda pair: -pair[1]["regression"])[: min(num_worst, num_cases)]
    taken = {place for place, _ in worst}
    kinds: dict[tuple, list[tuple[int, Case]]] = {}
    for place, case in numbered:
        if place not in taken:
            kinds.setdefault((str(case.get("task")), str(case.get("kind"))), []).append((place, case))
    generator = random.Random(seed)
    for candidates in kinds.values():
        generator.shuffle(candidates)
    drawn = []
    while len(drawn) < num_cases - len(worst) and any(kinds.values()):
        for kind in kinds:
            if kinds[kind] and len(drawn) < num_cases - len(worst):
                drawn.append(kinds[kind].pop())
    return [{**case, "why": "regression"} for _, case in worst] + [{**case, "why": "drawn"} for _, case in drawn]


def save_pictures(cases: Sequence[Case], folder: Path) -> list[dict]:
    """Saves the pictures of cases as `01.png`, `02.png`, ... (several of one case as `01-2.png`, ...).

    Args:
        cases: Cases; their `images` are PIL images or paths.
        folder: An existing folder.

    Returns:
        The cases with "pictures", the file names.
    """
    saved = []
    for place, case in enumerate(cases, start=1):
        names = []
        for order, image in enumerate(_images(case), start=1):
            name = f"{place:02d}.png" if order == 1 else f"{place:02d}-{order}.png"
            _shown(image).save(folder / name, format="PNG")
            names.append(name)
        saved.append({**case, "pictures": names})
    return saved


def _images(case: Case) -> list:
    images = case.get("images", case.get("image"))
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _shown(image: Any) -> PIL.Image.Image:
    """The picture at a size to look at: a tiny one enlarged by whole pixels, a large one reduced."""
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.open(image)
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    if max(image.size) < MIN_SIDE:
        factor = -(-MIN_SIDE // max(image.size))
        return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def cases_markdown(cases: Sequence[Case], folder: str = "cases") -> str:
    """The cases in Markdown, each with its question, its answers and its pictures."""
    return "\n\n".join(_case_markdown(place, case, folder) for place, case in enumerate(cases, start=1))


def _case_markdown(place: int, case: Case, folder: str) -> str:
    labels = [str(case[key]) for key in ("task", "kind", "bias_type", "id") if case.get(key) is not None]
    why = " (worst regression)" if case.get("why") == "regression" else ""
    lines = [f"### {place}. {cell(', '.join(labels)) or 'case'}{why}", ""]
    if case.get("pictures"):
        lines += [" ".join(f"![case {place}]({folder}/{name})" for name in case["pictures"]), ""]
    lines += [f"> {cell(_text(case.get('prompt', '')))}", ""]
    rows = [("expected", case.get("expected")), ("answer to unlearn", case.get("biased"))]
    rows += [(state, case.get(state)) for state in ("before", "after", "oracle")]
    lines += ["| | answer |", "| --- | --- |"]
    lines += [f"| {name} | {cell(_text(answer)) or MISSING} |" for name, answer in rows if answer is not None]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """Plain text of a prompt or an answer; of chat messages, each with its role."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        return str(value)
    return " / ".join(f"{message.get('role')}: {_content(message.get('content'))}" for message in value)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or f"({part.get('type')})" for part in content or [])
