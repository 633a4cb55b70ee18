"""Prompt templates from versioned YAML files, and the stage that asks for captions in other words."""

import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.data_builders.store import digest

BUILT_IN = ("captioning", "rephrase")


@dataclass(frozen=True)
class Templates:
    """The templates of one file.

    Attributes:
        version: of the file.
        slot: what each template must hold, in braces.
        texts: the templates.
        nouns: what may stand in the slot, where the file says so.
    """

    version: int
    slot: str
    texts: tuple[str, ...]
    nouns: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names this wording, for a stage's settings."""
        return f"{self.version}-{digest([self.slot, self.texts, self.nouns])[:8]}"

    def fill(self, number: int, value: str) -> str:
        """The template of a number, with its slot filled; braces in the value stay as they are."""
        return self.texts[number % len(self.texts)].replace("{" + self.slot + "}", value)


def read_templates(name_or_path: str) -> Templates:
    """Reads `captioning`, `rephrase`, or a file of one's own in the same form.

    Raises:
        FileNotFoundError: no such file.
        ValueError: all faults of the file: a template without its slot, with another one, one that is there twice.
    """
    text = _text_of(name_or_path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ValueError(f"{name_or_path}: this is not valid YAML: {err}") from err
    faults = list(_faults(content))
    if faults:
        raise ValueError("\n".join(f"{name_or_path}: {fault}" for fault in faults))
    return Templates(
        content["version"], content["slot"], tuple(content["templates"]), tuple(content.get("nouns") or ())
    )


def _text_of(name_or_path: str) -> str:
    if name_or_path in BUILT_IN:
        folder = resources.files("biasunlearn_trainer.data_builders").joinpath("templates")
        return folder.joinpath(f"{name_or_path}.yaml").read_text("utf-8")
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no templates at {str(path)!r}; give a YAML file, or {' or '.join(BUILT_IN)}"
        )
    return path.read_text("utf-8")


def _faults(content: Any) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"expected version, slot and templates, got {content!r:.60}"
        return
    for key, kind in (("version", int), ("slot", str), ("templates", list)):
        if not isinstance(content.get(key), kind):
            yield f"`{key}` must be a {kind.__name__}, got {content.get(key)!r:.60}"
    if not isinstance(content.get("templates"), list) or not isinstance(content.get("slot"), str):
        return
    if not content["templates"]:
        yield "`templates` is empty"
    for number, template in enumerate(content["templates"], start=1):
        yield from (
            f"template {number} ({template!r:.60}) {fault}" for fault in _template_faults(template, content["slot"])
        )
    if len(set(map(str, content["templates"]))) < len(content["templates"]):
        yield "a template is there twice"


def _template_faults(template: Any, slot: str) -> Iterator[str]:
    if not isinstance(template, str):
        yield "is no text"
        return
    try:
        slots = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as err:
        yield f"has braces that do not match: {err}"
        return
    if slots != [slot]:
        got = "no slot" if not slots else "the slots " + ", ".join("{" + name + "}" for name in slots)
        yield f"has {got}; expected {{{slot}}} once"


class CaptionPrompts:
    """A stream stage that gives captioning rows other prompts; which one a row gets depends on its id and the seed.

    Args:
        templates: `captioning`, our 20 prompts, or a file.
        seed: of the choice.
        kind: what the column `kind` becomes, for instance t_generality; none: it stays.

    `original_prompt` keeps what was there.
    """

    name = "caption_prompts"

    def __init__(self, templates: str = "captioning", seed: int = 0, kind: str | None = None):
        self._templates, self._seed, self._kind = read_templates(templates), seed, kind
        if not self._templates.nouns:
            raise ValueError(f"{templates}: `nouns` is missing: what stands in {{{self._templates.slot}}}")
        self.settings = {"templates": self._templates.key, "seed": seed, "kind": kind}

    def run(self, rows: Iterable[dict]) -> Iterator[dict]:
        """Yields the rows; those without pictures stay as they are."""
        for row in rows:
            yield self._asked_anew(row) if row.get("images") else row

    def _asked_anew(self, row: dict) -> dict:
        drawn = int(digest([self._seed, row.get("source"), row.get("source_id"), row["prompt"], row["completion"]]), 16)
        nouns = self._templates.nouns
        prompt = self._templates.fill(drawn, nouns[drawn // len(self._templates.texts) % len(nouns)])
        changed = {"prompt": with_text(row["prompt"], prompt), "original_prompt": text_of(row["prompt"])}
        return {**row, **changed, **({"kind": self._kind} if self._kind else {})}


def text_of(value: Any) -> str:
    """What a prompt or completion says: the text, or that of its last message."""
    if isinstance(value, str):
        return value
    content = value[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def with_text(value: Any, text: str) -> Any:
    """The same with another text; of messages, in the last one, whose pictures stay."""
    if isinstance(value, str):
        return text
    *before, last = value
    content = last["content"]
    if not isinstance(content, str):
        content = [part for part in content if part.get("type") != "text"] + [{"type": "text", "text": text}]
        return [*before, {**last, "content": content}]
    return [*before, {**last, "content": text}]
