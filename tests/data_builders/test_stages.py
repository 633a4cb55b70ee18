"""Rows through stages: order, what is asked how often, and what a store keeps through torn lines and full disks."""

import errno
import json
import resource
import threading
import time

import pytest

from biasunlearn_trainer.data_builders.stages import (
    Outcome,
    Reject,
    StageError,
    row_key,
    run_stages,
    stage_id,
)
from biasunlearn_trainer.data_builders.store import Store, StoreError, digest


class DropOdd:
    name, settings = "drop_odd", {}

    def run(self, rows):
        for row in rows:
            yield Reject(row, "odd") if row["n"] % 2 else row


class Square:
    """Answers the later rows of a batch window first, so that order is the engine's doing."""

    name = "square"

    def __init__(self, batch_size=1, concurrency=1, fail_at=None, settings=None):
        self.batch_size, self.concurrency, self.fail_at = batch_size, concurrency, fail_at
        self.settings = settings or {}
        self.asked, self.lock = [], threading.Lock()

    def key(self, row):
        return row_key(row, ("n",))

    def do(self, rows):
        with self.lock:
            self.asked.append([row["n"] for row in rows])
        if self.fail_at in (row["n"] for row in rows):
            raise StageError("the server is gone")
        time.sleep(0.002 * (3 - rows[0]["n"] % 4))
        return [
            Outcome(reason="too large", detail=str(row["n"])) if row["n"] > 90 else Outcome({"square": row["n"] ** 2})
            for row in rows
        ]


def flat(batches):
    return [n for batch in batches for n in batch]


def run(rows, stages, folder):
    rejects, items = [], []
    out = list(run_stages(rows, stages, folder, rejects.append, lambda stage, stored, attempts: items.append(stored)))
    return out, rejects, items


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (1, 6), (4, 1), (3, 3)])
def test_rows_come_in_order_whatever_the_batches_and_threads(tmp_path, batch_size, concurrency):
    rows = [{"n": n, "id": f"row {n}"} for n in range(100)]
    stage = Square(batch_size, concurrency)
    out, rejects, items = run(rows, [DropOdd(), stage], tmp_path)
    assert out == [{"n": n, "id": f"row {n}", "square": n * n} for n in range(0, 91, 2)]
    assert [(r.row["n"], r.reason, r.stage) for r in rejects if r.stage == "square"] == [
        (n, "too large", "square") for n in (92, 94, 96, 98)
    ]
    assert sum(r.stage == "drop_odd" for r in rejects) == 50
    assert sorted(flat(stage.asked)) == list(range(0, 100, 2))
    assert max(map(len, stage.asked)) == batch_size
    assert items == [False] * 50

    again = Square(batch_size, concurrency)
    assert run(rows, [DropOdd(), again], tmp_path)[:2] == (out, rejects)
    assert again.asked == []


def test_rows_with_one_key_are_asked_once_and_keep_their_own_columns(tmp_path):
    stage = Square(concurrency=4)
    out, _, items = run([{"n": 3, "id": i} for i in range(50)], [stage], tmp_path)
    assert stage.asked == [[3]]
    assert out == [{"n": 3, "id": i, "square": 9} for i in range(50)]
    assert items == [False] + [True] * 49


def test_what_was_answered_before_a_failure_is_not_asked_again(tmp_path):
    rows = [{"n": n} for n in range(40)]
    failing = Square(concurrency=3, fail_at=20)
    with pytest.raises(StageError, match="server is gone"):
        run(rows, [failing], tmp_path)
    first = set(flat(failing.asked)) - {20}
    assert first >= set(range(17))
    second = Square(concurrency=3)
    out, _, _ = run(rows, [second], tmp_path)
    assert set(flat(second.asked)) == set(range(40)) - first
    assert [row["square"] for row in out] == [n * n for n in range(40)]


def test_a_failure_that_is_not_final_is_asked_again(tmp_path):
    class Late(Square):
        def do(self, rows):
            super().do(rows)
            return [Outcome(reason="timeout", final=False) for _ in rows]

    out, rejects, _ = run([{"n": 1}, {"n": 1}], [Late()], tmp_path)
    assert out == []
    assert [reject.reason for reject in rejects] == ["timeout", "timeout"]
    again = Square()
    assert run([{"n": 1}], [again], tmp_path)[0] == [{"n": 1, "square": 1}]
    assert again.asked == [[1]]


class Stubborn(Square):
    """Refuses an odd number until its last attempt; stops altogether at an attempt for a number."""

    max_attempts = 3

    def __init__(self, stop_at=None, **options):
        super().__init__(**options)
        self.stop_at = stop_at

    def do(self, rows, attempt):
        with self.lock:
            self.asked += [(row["n"], attempt) for row in rows]
        if self.stop_at in [(row["n"], attempt) for row in rows]:
            raise StageError("the server is gone")
        refused = [row["n"] % 2 and attempt < 2 for row in rows]
        return [
            Outcome(reason="odd", retry=True) if no else Outcome({"square": row["n"] ** 2})
            for no, row in zip(refused, rows, strict=True)
        ]


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (4, 1), (3, 3)])
def test_refused_rows_get_their_attempts_and_no_attempt_is_made_twice(tmp_path, batch_size, concurrency):
    rows = [{"n": n} for n in range(20)]
    expected = [(n, attempt) for n in range(20) for attempt in range(3 if n % 2 else 1)]
    quiet = Stubborn(batch_size=batch_size, concurrency=concurrency)
    assert run(rows, [quiet], tmp_path / "quiet")[0] == [{"n": n, "square": n * n} for n in range(20)]
    assert sorted(quiet.asked) == expected

    stopped = Stubborn((7, 1), batch_size=batch_size, concurrency=concurrency)
    with pytest.raises(StageError):
        run(rows, [stopped], tmp_path / "stopped")
    again = Stubborn(batch_size=batch_size, concurrency=concurrency)
    assert run(rows, [again], tmp_path / "stopped")[0] == [{"n": n, "square": n * n} for n in range(20)]
    # What was under way when it stopped is asked again, and nothing else; number 7 had its first attempt.
    repeated = set(stopped.asked) & set(again.asked)
    assert (7, 0) not in repeated and (7, 1) in repeated and len(repeated) <= batch_size
    assert set(stopped.asked) | set(again.asked) == set(expected)


def test_other_settings_have_another_store(tmp_path):
    run([{"n": 1}], [Square(settings={"model": "a"})], tmp_path)
    other = Square(settings={"model": "b"})
    run([{"n": 1}], [other], tmp_path)
    assert other.asked == [[1]]
    assert len(list(tmp_path.glob("square-*.jsonl"))) == 2
    assert stage_id(other) == f"square-{digest({'model': 'b'})[:12]}"


def test_a_stage_of_neither_kind_and_a_wrong_number_of_outcomes_are_named(tmp_path):
    with pytest.raises(TypeError, match="is no stage"):
        run([], [object()], tmp_path)

    class Short(Square):
        def do(self, rows):
            return []

    with pytest.raises(ValueError, match="square returned 0 outcomes for 1 rows"):
        run([{"n": 1}], [Short()], tmp_path)
    with pytest.raises(ValueError, match="a row or a reason"):
        Outcome()


def test_input_is_taken_only_as_far_as_it_is_needed(tmp_path):
    taken = []

    def endless():
        for n in range(10**9):
            taken.append(n)
            yield {"n": n}

    rows = run_stages(endless(), [Square(batch_size=2, concurrency=2)], tmp_path, lambda reject: None)
    assert [next(rows)["n"] for _ in range(3)] == [0, 1, 2]
    rows.close()
    assert len(taken) <= 3 + 16


def test_a_torn_last_line_is_cut_off_and_a_torn_middle_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    with Store(path) as store:
        store.put("a", {"row": {"text": "grüße"}})
        store.put("b", {"row": {"text": "two"}})
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1]) + 1):
        path.write_bytes(whole[:-cut])
        with Store(path) as store:
            assert "a" in store and "b" not in store
            store.put("b", {"row": {"text": "again"}})
            assert store.get("a") == {"row": {"text": "grüße"}}
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    path.write_bytes(b"{torn\n" + whole)
    with pytest.raises(StoreError, match=r"s\.jsonl:1 is no stored line"):
        Store(path)


def test_a_key_keeps_its_first_value_and_two_builds_cannot_share_a_store(tmp_path):
    with Store(tmp_path / "s.jsonl") as store:
        store.put("a", {"row": 1})
        store.put("a", {"row": 2})
        assert store.get("a") == {"row": 1}
        assert len(store) == 1
        with pytest.raises(StoreError, match="in use by another build"):
            Store(tmp_path / "s.jsonl")
    assert Store(tmp_path / "s.jsonl").get("a") == {"row": 1}


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(tmp_path):
    """A limit on file size makes the kernel write part of a line, then refuse, as a full disk does (EFBIG, ENOSPC)."""
    import signal

    path = tmp_path / "s.jsonl"
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Store(path) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(StoreError, match=r"cannot be written.*are kept: make room") as caught:
                for n in range(1000):
                    store.put(str(n), {"row": {"text": "x" * 50}})
            assert caught.value.__cause__.errno == errno.EFBIG
            kept = len(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    assert kept >= 5
    assert path.read_bytes().endswith(b"\n")
    with Store(path) as store:
        assert len(store) == kept
        store.put("more", {"row": {}})
        assert store.get(str(kept - 1)) == {"row": {"text": "x" * 50}}


def test_two_stages_of_the_same_settings_share_a_store(tmp_path):
    rows = [{"n": n, "kind": "ab"[n % 2]} for n in range(10)]
    stages = [Square(), Square()]
    stages[0].where, stages[1].where = {"kind": "a"}, {"kind": "b"}
    out, _, _ = run(rows, stages, tmp_path)
    assert [row["square"] for row in out] == [n * n for n in range(10)]
    assert sorted(flat(stages[0].asked)) == [0, 2, 4, 6, 8] and sorted(flat(stages[1].asked)) == [1, 3, 5, 7, 9]
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    again = Square()
    assert run(rows, [again], tmp_path)[0] == out and not again.asked
