"""The build engine: rows flow through a chain of stages, and what was expensive is asked once.

A stage is one of two kinds. A *stream stage* is cheap, and runs again in every build:

    class Shorten:
        name = "shorten"

        def __init__(self, num_words: int = 20):
            self.settings = {"num_words": num_words}

        def run(self, rows):
            for row in rows:
                words = row["completion"].split()
                if not words:
                    yield Reject(row, "empty")
                else:
                    yield {**row, "completion": " ".join(words[: self.settings["num_words"]])}

An *item stage* is expensive (a language model, a diffusion model). It gets rows in batches and returns one `Outcome` a
row, which is on the disk before it is used; a build that was killed reads it there instead of asking again:

    class Ask:
        name, batch_size, concurrency = "ask", 1, 8

        def __init__(self, url):
            self.settings = {"url": url}

        def key(self, row):
            return row_key(row, ("completion",))

        def do(self, rows):
            return [Outcome({"completion": ask(row["completion"])}) for row in rows]

`settings` holds whatever changes the result, as JSON, and nothing secret: it is written to disk, and another value
starts another store. What changes no result (a timeout, the number of threads) does not belong there.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from biasunlearn_trainer.data_builders.parts import has_values
from biasunlearn_trainer.data_builders.store import Store, digest

WINDOW = 4
"""Batches a thread that may be begun ahead of the row that is yielded next: enough that one slow one stops nobody."""


class StageError(RuntimeError):
    """A stage cannot go on at all (a refused key, a server that is gone); what was stored stays."""


@dataclass(frozen=True)
class Reject:
    """A row that a stage takes out.

    Attributes:
        row: the row as it came to the stage.
        reason: a few words, the same for all rows of a kind, since rejects are counted by it ("no demographic term").
        detail: what is particular to this row, for instance the answer that was refused.
        stage: which stage took it out; the engine fills it in.
        attempts: how often a stage that asks has asked for it; the reason is that of the last time.
    """

    row: dict
    reason: str
    detail: str = ""
    stage: str = ""
    attempts: int = 1


@dataclass(frozen=True)
class Outcome:
    """What an item stage made of one row.

    Attributes:
        row: the columns that it sets, as JSON; the row that goes on is `{**row, **outcome.row}`. None for a reject.
        reason: why there is none; as in `Reject`.
        detail: as in `Reject`.
        final: False for a failure that another build may not meet (a timeout): it is not stored, and asked again.
        retry: True for a reject that another attempt may better; see `max_attempts` of `ItemStage`.
    """

    row: Mapping[str, Any] | None = None
    reason: str | None = None
    detail: str = ""
    final: bool = True
    retry: bool = False

    def __post_init__(self):
        """Refuses an outcome that is both or neither."""
        if (self.row is None) == (self.reason is None):
            raise ValueError(f"an Outcome is a row or a reason, got row={self.row!r:.60} and reason={self.reason!r}")


@runtime_checkable
class StreamStage(Protocol):
    """A cheap stage: `run` takes rows and yields rows and `Reject`s, one row at a time and in order."""

    name: str
    settings: Mapping[str, Any]

    def run(self, rows: Iterable[dict]) -> Iterator[dict | Reject]:
        """Yields what becomes of the rows."""


@runtime_checkable
class ItemStage(Protocol):
    """An expensive stage. Further attributes that the engine looks for:

    `batch_size` (default 1): rows that `do` gets at once, fewer in the last batch; a batch is stored when it is done.
    `concurrency` (default 1): threads that call `do` at the same time.
    `max_attempts` (default 1): how often a row is asked for whose outcome says `retry`; with more than one, the engine
        calls `do(rows, attempt)`, from 0. Every attempt is stored: raising the number asks for the new ones alone.
    `folder`: where it is there, the engine sets it to a folder of the stage's own (pictures), before the first row.
    `keep_rows` (default False): every row goes on as it came, too, before what became of it.
    `where` (default empty): column and value, or values; a row without them goes on as it came and is not asked.
    `is_shared` (default False): processes that were launched together share its items (`processes.py`).
    `rows_from(row, columns)`: yields the rows that go on of a row and its outcome's, in place of `{**row, **columns}`.
    `close()`: called when the rows are through, or the build stops.
    """

    name: str
    settings: Mapping[str, Any]

    def key(self, row: dict) -> str:
        """Names what is asked: rows with the same key are asked once and get the same outcome."""

    def do(self, rows: list[dict]) -> list[Outcome]:
        """Returns one outcome a row, in order."""


Stage = StreamStage | ItemStage


def row_key(row: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """A key of an item: the digest of the row, or of some of its columns."""
    return digest(dict(row) if columns is None else [row.get(column) for column in columns])


def stage_id(stage: Stage) -> str:
    """Name and settings of a stage in one word, "rephrase_text-1f0c9a52b7e4": the name of its store."""
    return f"{stage.name}-{digest(dict(stage.settings))[:12]}"


def run_stages(
    rows: Iterable[dict],
    stages: Sequence[Stage],
    folder: str | Path,
    on_reject: Callable[[Reject], None],
    on_item: Callable[[Stage, bool, int], None] = lambda stage, was_stored, attempts: None,
) -> Iterator[dict]:
    """Sends rows through stages.

    Args:
        rows: in the schema's columns; of item stages' keys, everything JSON can write.
        stages: in order.
        folder: where item stages store their outcomes, a file a stage and its settings.
        on_reject: called for every row that is taken out, with the stage's name filled in.
        on_item: called for every row that passed an item stage: whether its outcome was there already, and how many
            attempts it took.

    Yields:
        The rows that came through, in the order in which they came, however many threads a stage uses.

    Raises:
        TypeError: a stage is of neither kind.
        ValueError: a stage returned another number of outcomes than it got rows.
        StageError, StoreError: from a stage; what was answered until then is stored.
    """
    with ExitStack() as opened:
        # Two stages of the same settings, for other rows each (`where`), have one store.
        stores: dict[str, Store] = {}
        for stage in stages:
            if isinstance(stage, ItemStage):
                name = stage_id(stage)
                if name not in stores:
                    stores[name] = opened.enter_context(open_store(stage, Path(folder)))
                _give_folder(stage, Path(folder))
                rows = _run_items(rows, stage, stores[name], on_item)
            elif isinstance(stage, StreamStage):
                rows = stage.run(rows)
            else:
                raise TypeError(
                    f"{stage!r} is no stage: it needs name, settings, and run(rows) or key(row) and do(rows)."
                )
            rows = _without_rejects(rows, stage.name, on_reject)
        yield from rows


def _without_rejects(rows: Iterable[dict | Reject], name: str, on_reject: Callable[[Reject], None]) -> Iterator[dict]:
    for row in rows:
        if isinstance(row, Reject):
            on_reject(replace(row, stage=row.stage or name))
        else:
            yield row


def _run_items(
    rows: Iterable[dict], stage: ItemStage, store: Store, on_item: Callable[[Stage, bool, int], None]
) -> Iterator[dict | Reject]:
    try:
        yield from _Items(stage, store, on_item).run(rows)
    finally:
        getattr(stage, "close", lambda: None)()


def open_store(stage: ItemStage, folder: Path, part: str = "") -> Store:
    """Opens the store of an item stage, and gives the stage its folder.

    Args:
        stage: its name and settings name the store.
        folder: of all stores.
        part: of a process's own store; without one, the parts that are there are taken in first.
    """
    name = stage_id(stage)
    _give_folder(stage, folder)
    store = Store(folder / f"{name}{part and '.'}{part}.jsonl")
    if not part:
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            store.take_in(path)
    return store


def _give_folder(stage: ItemStage, folder: Path) -> None:
    if hasattr(stage, "folder"):
        stage.folder = folder / stage_id(stage)
        stage.folder.mkdir(parents=True, exist_ok=True)


def ask_for(rows: Iterable[dict], stage: ItemStage, folder: Path, part: str) -> None:
    """Asks for rows and stores their outcomes in a part of the stage's store, for another process to take in."""
    try:
        with open_store(stage, folder, part) as store:
            for _ in _Items(stage, store, lambda *item: None).run(rows):
                pass
    finally:
        getattr(stage, "close", lambda: None)()


def pending_rows(rows: Iterable[dict], stage: ItemStage, folder: Path) -> Iterator[dict]:
    """Yields, of rows that reach an item stage, those whose outcome is not stored, one for each key."""
    with open_store(stage, folder) as store:
        items, listed = _Items(stage, store, lambda *item: None), set()
        for row in rows:
            if not has_values(row, getattr(stage, "where", {})):
                continue
            key = stage.key(row)
            if key not in listed and not items.is_stored(key):
                listed.add(key)
                yield row


class _Items:
    """Rows of one item stage under way: those waiting for a batch, those being asked, those stored."""

    def __init__(self, stage: ItemStage, store: Store, on_item: Callable[[Stage, bool, int], None]):
        self.stage, self.store, self.on_item = stage, store, on_item
        self.batch_size, self.concurrency = getattr(stage, "batch_size", 1), getattr(stage, "concurrency", 1)
        self.max_attempts = getattr(stage, "max_attempts", 1)
        # Of each row under way its key (None where it only passes), and whether it was asked for before.
        self.rows: deque[tuple[dict, str | None, bool]] = deque()
        self.futures: dict[str, Future] = {}
        self.waiting: dict[str, dict] = {}

    def run(self, rows: Iterable[dict]) -> Iterator[dict | Reject]:
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.stage.name)
        try:
            for row in rows:
                self._take(row, pool)
                while len(self.rows) >= WINDOW * self.batch_size * self.concurrency:
                    yield from self._next(pool)
            while self.rows:
                yield from self._next(pool)
        finally:
            # Batches that are being answered are paid for: they are waited for and stored, the others are dropped.
            pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, row: dict, pool: ThreadPoolExecutor) -> None:
        if not has_values(row, getattr(self.stage, "where", {})):
            self.rows.append((row, None, False))
            return
        key = self.stage.key(row)
        was_stored = key in self.futures or key in self.waiting or self.is_stored(key)
        self.rows.append((row, key, was_stored))
        if not was_stored:
            self.waiting[key] = row
            if len(self.waiting) == self.batch_size:
                self._ask(pool)

    def _ask(self, pool: ThreadPoolExecutor) -> None:
        batch, self.waiting = self.waiting, {}
        future = pool.submit(self._do, batch)
        self.futures.update(dict.fromkeys(batch, future))

    def _stored(self, key: str) -> tuple[Outcome | None, int]:
        """The outcome of the last attempt that is stored, and how many are."""
        outcome, attempt = None, 0
        while attempt < self.max_attempts and _attempt_key(key, attempt) in self.store:
            outcome = Outcome(**self.store.get(_attempt_key(key, attempt)))
            attempt += 1
            if not outcome.retry:
                break
        return outcome, attempt

    def is_stored(self, key: str) -> bool:
        """Whether nothing is to be asked for."""
        return self._is_settled(*self._stored(key))

    def _is_settled(self, outcome: Outcome | None, attempts: int) -> bool:
        return outcome is not None and (not outcome.retry or attempts >= self.max_attempts)

    def _do(self, batch: dict[str, dict]) -> dict[str, Outcome]:
        """Asks for a batch until each row is settled, storing every attempt; returns what was not stored."""
        failed = {}
        for attempt in range(self.max_attempts):
            reached = {key: self._stored(key) for key in batch}
            rows = {
                key: row
                for key, row in batch.items()
                if key not in failed and reached[key][1] == attempt and not self._is_settled(*reached[key])
            }
            for key, outcome in self._asked(rows, attempt):
                if outcome.final:
                    value = {"row": outcome.row, "reason": outcome.reason, "detail": outcome.detail}
                    value |= {"retry": True} if outcome.retry else {}
                    self.store.put(_attempt_key(key, attempt), value)
                else:
                    failed[key] = outcome
        return failed

    def _asked(self, rows: dict[str, dict], attempt: int) -> Iterator[tuple[str, Outcome]]:
        if not rows:
            return iter(())
        numbered = (attempt,) if self.max_attempts > 1 else ()
        outcomes = list(self.stage.do(list(rows.values()), *numbered))
        if len(outcomes) != len(rows):
            raise ValueError(f"stage {self.stage.name} returned {len(outcomes)} outcomes for {len(rows)} rows.")
        return zip(rows, outcomes, strict=True)

    def _next(self, pool: ThreadPoolExecutor) -> Iterator[dict | Reject]:
        row, key, was_stored = self.rows.popleft()
        if key is None:
            yield row
            return
        if key in self.waiting:
            self._ask(pool)
        failed = self.futures[key].result() if key in self.futures else {}
        if not any(key == later for _, later, _ in self.rows):
            self.futures.pop(key, None)
        # Read back even when it is new, so that the rows of a first build and of a continued one are the same.
        outcome, attempts = self._stored(key)
        if key in failed:
            outcome, attempts = failed[key], attempts + 1
        self.on_item(self.stage, was_stored, attempts)
        if getattr(self.stage, "keep_rows", False):
            yield row
        if outcome.row is None:
            yield Reject(row, outcome.reason, outcome.detail, attempts=attempts)
        elif hasattr(self.stage, "rows_from"):
            yield from self.stage.rows_from(row, outcome.row)
        else:
            yield {**row, **outcome.row}


def _attempt_key(key: str, attempt: int) -> str:
    return f"{key}/{attempt}" if attempt else key
