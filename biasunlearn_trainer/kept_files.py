"""Files of what was computed once: each says what it was made of, and is read only where just that is asked for.

A file's name is the digest of what went into it, its parts: the model's weights, the tokenizer, the rows, settings. The
parts stand in the file, too, so that a file under a wrong name is refused, and one that is missing can be told
from the nearest that is there. A file is written beside its place and renamed: a writer that is killed leaves nothing
that is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

# Files that are looked at, the newest first, to say what a missing one differs in. 300 take 10 to 20 ms.
LOOKED_AT = 300
# After this time without a word a half-written file of another machine belongs to nobody.
ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class KeptFile:
    """A file of arrays in a folder that many runs share.

    Attributes:
        folder: where it is.
        kind: what it holds, as a message says it: `reference log-probabilities`.
        of: whose they are, as a message says it: `forget set`. No part of it: two sets may hold the same rows.
        parts: what it is made of, by name.
        tells: whether this process says what it finds; others of the machine find the same.
    """

    folder: Path
    kind: str
    of: str
    parts: Mapping[str, str]
    tells: bool = True

    @property
    def path(self) -> Path:
        """Where the file is, or would be."""
        return self.folder / f"{digest_of(self.kind, self.parts)}.safetensors"

    def load(
        self, check: Callable[[Mapping[str, Tensor]], str | None] = lambda arrays: None
    ) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The file's arrays, memory-mapped, and its metadata; None where it is not there or refused, which is said.

        Args:
            check: says what is wrong with the arrays, beside what a checksum finds.
        """
        if not os.path.isfile(self.path):
            self._tell_of_nearest()
            return None
        arrays, metadata, fault = _read(self.path)
        fault = fault or self._fault(arrays, metadata) or check(arrays)
        if fault is None:
            self._say(logging.INFO, f"{self._title}: {self.path}")
            return arrays, metadata
        self._say(logging.WARNING, f"{self._title}: {self.path} is not read, {fault}. Made anew.")
        return None

    def save(self, arrays: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bool:
        """Write the arrays; where the disk does not take them that is said, and False is returned."""
        try:
            with replacing(self.path) as partial:
                checksums = {name: checksum(value) for name, value in arrays.items()}
                save_file(dict(arrays), partial, {**(metadata or {}), **self.metadata(checksums)})
        except (OSError, SafetensorError) as err:
            self._say(
                logging.WARNING,
                f"{self._title} cannot be kept in {self.folder} ({err}): this run has them in memory, the next makes "
                "them anew.",
            )
            return False
        return True

    def metadata(self, checksums: Mapping[str, int]) -> dict[str, str]:
        """What the file says of itself."""
        made = {"parts": dict(self.parts), "checksums": checksums}
        return {"kind": self.kind, "of": self.of, **{name: json.dumps(value) for name, value in made.items()}}

    @property
    def _title(self) -> str:
        return f"{self.kind[0].upper()}{self.kind[1:]} of the {self.of}"

    def _fault(self, arrays: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
        try:
            return misfit(metadata, self.kind, self.parts) or _damage(arrays, metadata)
        except (KeyError, ValueError) as err:
            return f"its header is damaged: {err!r}"

    def _tell_of_nearest(self) -> None:
        others = newest(self.folder, "*.safetensors") if self.tells else []
        if found := nearest(((path, _own_words(path, self.kind, self.of)) for path in others), self.parts):
            logger.warning("%s: %s was made with %s. Made anew.", self._title, *found)

    def _say(self, level: int, message: str) -> None:
        if self.tells:
            logger.log(level, "%s", message)


def digest_of(kind: str, parts: Mapping[str, str]) -> str:
    """What a file with these parts is called."""
    return hashlib.blake2b(json.dumps([kind, sorted(parts.items())]).encode(), digest_size=12).hexdigest()


def differences(found: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """In which parts two files differ, with both values.

    Example:
        >>> differences({"rows": "a", "model": "m"}, {"rows": "b", "model": "m"})
        ['other rows (a, expected b)']
    """
    names = [name for name in {**asked, **found} if found.get(name) != asked.get(name)]
    return [f"other {name} ({found.get(name)}, expected {asked.get(name)})" for name in names]


def misfit(metadata: Mapping[str, str], kind: str, parts: Mapping[str, str]) -> str | None:
    """Why a file is not the one that is asked for, by its own words."""
    if metadata.get("kind") != kind:
        return f"it holds {metadata.get('kind', 'something unknown')}"
    others = differences(json.loads(metadata["parts"]), parts)
    return f"it was made with {' and '.join(others)}" if others else None


def nearest(
    candidates: Iterable[tuple[Path, Mapping[str, str] | None]], asked: Mapping[str, str]
) -> tuple[Path, str] | None:
    """Of files with their parts the one nearest to those that are asked for, and what it differs in.

    None where none shares half of the parts: such a file is another experiment's, and nobody expected it to fit.
    """
    found = [(path, differences(parts, asked)) for path, parts in candidates if parts is not None]
    path, others = min(found, key=lambda each: len(each[1]), default=(None, []))
    return (path, " and ".join(others)) if 0 < len(others) <= len(asked) / 2 else None


def checksum(value: Tensor, start: int = 0) -> int:
    """CRC-32 of an array's bytes, 4 GB a second, going on from `start`."""
    return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, a file to write that takes the place of `path` in the end, unless an error comes between.

    Raises:
        OSError: from the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob("*.partial"):
        if _is_abandoned(other):
            other.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{_node()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)  # safetensors keeps a new file to its owner, and caches are shared
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def everywhere(accelerator: Accelerator, is_so: bool) -> bool:
    """Whether something is so on every process; all of them have to ask, and all get one answer."""
    said = torch.tensor([int(is_so)], device=accelerator.device)
    return int(accelerator.gather(said).min()) == 1


def newest(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder, the newest first, `LOOKED_AT` at most."""
    found = []
    for path in folder.glob(pattern):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue  # another run took it away
    return [path for _, path in sorted(found, reverse=True)[:LOOKED_AT]]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}, None  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        return {}, {}, f"it is damaged: {err}"


def _damage(arrays: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    expected = json.loads(metadata["checksums"])
    bad = sorted(expected.keys() ^ arrays.keys())
    bad += [name for name, value in arrays.items() if name in expected and checksum(value) != expected[name]]
    return f"it is damaged: {', '.join(bad)} of another checksum than when written" if bad else None


def _own_words(path: Path, kind: str, of: str) -> dict[str, str] | None:
    """A file's parts, if it is one of this kind for the same set; of its arrays nothing is read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["parts"]) if (metadata.get("kind"), metadata.get("of")) == (kind, of) else None
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _node() -> str:
    return socket.gethostname().replace(".", "-")


def _is_abandoned(partial: Path) -> bool:
    """Whether nobody writes a half-written file any more: its process is gone, or, on another machine, silent."""
    try:
        *_, host, pid, _, _ = partial.name.split(".")
        number = int(pid)
        if host == _node():
            os.kill(number, 0)
        return time.time() - partial.stat().st_mtime > ABANDONED_SECONDS
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
