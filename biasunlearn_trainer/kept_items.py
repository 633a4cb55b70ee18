"""Lists of JSON objects that were computed once, as `kept_files`: their first line says what they were made of."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasunlearn_trainer.kept_files import digest_of, misfit, nearest, newest, replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptItems:
    """A file of objects in a folder that many runs share.

    Attributes:
        folder: where it is.
        kind: what it holds, as a message says it: `records`.
        parts: what it is made of, by name.
    """

    folder: Path
    kind: str
    parts: Mapping[str, str]

    @property
    def path(self) -> Path:
        """Where the file is, or would be."""
        return self.folder / f"{digest_of(self.kind, self.parts)}.json"

    def load(self, tell_of_nearest: bool = False) -> list[dict[str, Any]] | None:
        """The objects; None where the file is not there, or is another's or damaged, which is said.

        Args:
            tell_of_nearest: say of a file that is not there what the nearest one differs in.
        """
        try:
            head, _, body = self.path.read_bytes().partition(b"\n")
            made = json.loads(head)
            fault = misfit(made, self.kind, self.parts)
            fault = fault or (None if zlib.crc32(body) == made["checksum"] else "it is damaged")
        except FileNotFoundError:
            if tell_of_nearest:
                self._tell_of_nearest()
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            fault = f"it is damaged: {err!r}"
        if fault is None:
            return json.loads(body)
        logger.warning("%s: %s is not read, %s. Made anew.", self._title, self.path, fault)
        return None

    def save(self, items: Sequence[Mapping[str, Any]]) -> bool:
        """Write the objects; where the disk does not take them that is said, and False is returned."""
        body = json.dumps(items)
        head = {"kind": self.kind, "parts": json.dumps(dict(self.parts)), "checksum": zlib.crc32(body.encode())}
        try:
            with replacing(self.path) as partial:
                partial.write_text(f"{json.dumps(head)}\n{body}", encoding="utf-8")
        except OSError as err:
            logger.warning("%s cannot be kept in %s (%s): the next run makes them anew.", self._title, self.folder, err)
            return False
        return True

    @property
    def _title(self) -> str:
        return f"{self.kind[0].upper()}{self.kind[1:]}"

    def _tell_of_nearest(self) -> None:
        others = ((path, _own_words(path, self.kind)) for path in newest(self.folder, "*.json"))
        if found := nearest(others, self.parts):
            logger.warning("%s: %s was made with %s. Made anew.", self._title, *found)


def _own_words(path: Path, kind: str) -> dict[str, str] | None:
    """A file's parts, if it is of this kind; of its objects nothing is read."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
        return json.loads(head["parts"]) if head["kind"] == kind else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
