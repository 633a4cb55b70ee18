"""Answers that were paid for, kept on disk: one JSON line an answer, written before it is used, never written twice."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StoreError(RuntimeError):
    """A store that cannot be written or is in use; what it holds stays usable."""


def digest(value: Any) -> str:
    """A 32-digit BLAKE2 digest of anything JSON can write, whatever the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store:
    """An append-only JSON Lines file of values by key.

    A line is on the disk (fsync) before `put` returns, so that a process that is killed at any moment loses at most the
    value that it was writing: a torn last line is cut off when the file is opened again. Only the places of the
    lines are held in memory. One process at a time has a store open.

    Args:
        path: the file; its folder is made.

    Raises:
        StoreError: another process has it open, or a line that is not the last is no JSON.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Unbuffered: a buffer would be written once more when the file is closed after a disk was full.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115, closed by close()
        try:
            _lock_file(self._file, self.path)
            self._places = self._read_places()
        except BaseException:
            self._file.close()
            raise

    def _read_places(self) -> dict[str, tuple[int, int]]:
        places, place = {}, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    places[json.loads(line)["key"]] = (place, len(line))
                except (ValueError, KeyError, TypeError) as err:
                    raise StoreError(
                        f"{self.path}:{number} is no stored line ({err}). Delete that line; the others are kept."
                    ) from err
                place += len(line)
        self._file.truncate(place)
        self._end = place
        return places

    def __contains__(self, key: str) -> bool:
        """Whether the key has a value."""
        return key in self._places

    def __len__(self) -> int:
        """The number of keys."""
        return len(self._places)

    def get(self, key: str) -> dict[str, Any]:
        """Reads the value of a key; KeyError where there is none."""
        place, length = self._places[key]
        with self._lock:
            self._file.seek(place)
            return json.loads(self._file.read(length))["value"]

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Stores a value and returns when it is on the disk. A key that has one keeps it.

        Raises:
            StoreError: the file cannot be written (a full disk); it is cut back to what it held.
        """
        line = (json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if key in self._places:
                return
            try:
                self._write(line)
            except OSError as err:
                self._file.truncate(self._end)
                raise StoreError(
                    f"{self.path} cannot be written: {err.strerror or err}. Its {len(self)} answers are kept: make "
                    "room and start the same build again, it continues there."
                ) from err
            self._places[key] = (self._end, len(line))
            self._end += len(line)

    def take_in(self, path: Path) -> None:
        """Moves the values of another store into this one and removes its file.

        Raises:
            StoreError: as for opening it; a process that still writes to it keeps it.
        """
        with Store(path) as other:
            for key in other._places:
                self.put(key, other.get(key))
            path.unlink()

    def _write(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, which unlocks it."""
        self._file.close()

    def __enter__(self) -> "Store":
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Closes the file."""
        self.close()


def _lock_file(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has none; two builds at once are then on their own
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise StoreError(f"{path} is in use by another build. Wait for it, or give this one another folder.") from err
