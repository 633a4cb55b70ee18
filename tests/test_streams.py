"""Pairing is a pure function of seed, epoch and position."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from torch.utils.data import DataLoader

from biasunlearn_trainer.orders import order
from biasunlearn_trainer.streams import DrawSampler, PairedStreams, align, dealt_batches, has_images, modality_batches


def rows(num, pictured=False):
    return [{"prompt": str(i), "completion": "x", **({"images": ["a.png"]} if pictured else {})} for i in range(num)]


def draws(streams, epochs):
    return [streams.indices(draw) for draw in range(epochs * len(streams))]


def test_an_epoch_takes_every_forget_row_once_in_a_new_order():
    streams = PairedStreams({"forget": rows(10)}, seed=1, rows_per_step=4)
    first, second = ([streams.indices(draw)["forget"][0] for draw in range(e * 10, e * 10 + 10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_retain_rows_come_without_replacement_whatever_the_lengths():
    streams = PairedStreams({"forget": rows(8), "retain": rows(3)}, seed=1, rows_per_step=4)
    seen = Counter(d["retain"][0] for d in draws(streams, 3))
    assert max(seen.values()) - min(seen.values()) <= 1
    longer = PairedStreams({"forget": rows(8), "retain": rows(20)}, seed=1, rows_per_step=4)
    assert len({d["retain"][0] for d in draws(longer, 2)}) == 16


def test_two_seeds_differ_and_one_repeats():
    make = lambda seed: draws(PairedStreams({"forget": rows(12), "retain": rows(9)}, seed, 4), 2)  # noqa: E731
    assert make(0) == make(0)
    assert make(0) != make(1)


def test_a_seed_gives_the_rows_that_it_has_always_given():
    streams = PairedStreams({"forget": rows(12), "retain": rows(5)}, seed=3, rows_per_step=4)
    drawn = [(d["forget"][0], d["retain"][0]) for d in draws(streams, 1)]
    assert drawn[:6] == [(0, 0), (9, 3), (7, 1), (1, 2), (2, 4), (11, 2)]


def test_streams_of_equal_length_are_not_in_lockstep():
    pairs = draws(PairedStreams({"forget": rows(30), "retain": rows(30)}, 0, 4), 1)
    assert sum(d["forget"] == d["retain"] for d in pairs) < 10


@pytest.mark.parametrize("num_forget", [8, 10])
def test_a_step_is_of_one_modality_in_proportion_to_the_rows(num_forget):
    retain = rows(30) + rows(10, pictured=True)
    streams = PairedStreams({"forget": rows(num_forget), "retain": retain}, seed=3, rows_per_step=4)
    pictured = []
    for epoch in range(40):
        for start in range(0, num_forget, 4):
            step = range(epoch * num_forget + start, epoch * num_forget + min(start + 4, num_forget))
            kinds = {streams.indices(draw)["retain"][0] >= 30 for draw in step}
            assert len(kinds) == 1
            pictured.append(kinds.pop())
    assert np.mean(pictured) == pytest.approx(0.25, abs=0.02)


def test_a_mixed_forget_set_fills_its_blocks_and_misses_no_row():
    streams = PairedStreams({"forget": rows(5) + rows(6, pictured=True)}, seed=0, rows_per_step=4)
    numbers = [streams.indices(draw)["forget"][0] for draw in range(len(streams))]
    assert len(streams) == 16 and set(numbers) == set(range(11))
    for start in range(0, 16, 4):
        assert len({number >= 5 for number in numbers[start : start + 4]}) == 1


def test_processes_share_whole_batches():
    assert len(PairedStreams({"forget": rows(10)}, 0, 8, multiple_of=4)) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_live_through_epochs_give_the_same_pairs(workers):
    streams = PairedStreams({"forget": rows(6), "retain": rows(4)}, seed=5, rows_per_step=2)
    sampler = DrawSampler(len(streams))
    loader = DataLoader(
        streams, 2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, collate_fn=list
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        got = [
            {name: [row["index"] for row in rows] for name, rows in draw.items()} for batch in loader for draw in batch
        ]
        assert got == [streams.indices(draw) for draw in range(epoch * 6, epoch * 6 + 6)]


def test_streams_pickle():
    streams = PairedStreams({"forget": rows(5)}, 0, 2)
    assert draws(pickle.loads(pickle.dumps(streams)), 2) == draws(streams, 2)


def test_order_depends_on_every_part_of_its_key():
    orders = {
        tuple(order(20, *key)) for key in [(0, "forget", 0), (1, "forget", 0), (0, "retain", 0), (0, "forget", 1)]
    }
    assert len(orders) == 4


def test_images_are_found_without_decoding_them():
    features = Features(prompt=Value("string"), images=List(Image()))
    unreadable = {"bytes": b"no picture", "path": None}
    data = Dataset.from_dict(
        {"prompt": ["a", "b", "c"], "images": [[unreadable], [], None]},
        features=features,
    )
    assert has_images(data).tolist() == [True, False, False]
    assert has_images(data.select([2, 0])).tolist() == [False, True]
    assert [batch.tolist() for batch in modality_batches(data, 2)] == [[0], [1, 2]]


def test_align_by_pair_id_or_position():
    forget = [{"pair_id": key} for key in "abc"]
    preferred = [{"pair_id": key, "answer": key.upper()} for key in "cabd"]
    assert [row["answer"] for row in align(forget, preferred, "preferred")] == ["A", "B", "C"]
    assert align(rows(2), rows(2), "preferred") == rows(2)
    with pytest.raises(ValueError, match=r"3 rows for 2 forget rows"):
        align(rows(2), rows(3), "preferred")
    with pytest.raises(ValueError, match=r"1 forget rows have no preferred row.*'c'"):
        align(forget, preferred[1:], "preferred")
    with pytest.raises(ValueError, match="twice"):
        align(forget, [*preferred, preferred[0]], "preferred")


@pytest.mark.parametrize("num_forget", [8, 11])
@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_a_stream_has_a_batch_size_of_its_own(size, num_forget):
    """Four forget rows a micro-batch, `size` of the other stream: the same rows a step however the batch is cut."""
    sets = {"forget": rows(num_forget), "retain": rows(7)}
    streams = PairedStreams(sets, 0, 8, rows_per_draw={"retain": Fraction(size, 4)})
    taken = []
    for epoch in range(7):
        for start in range(0, num_forget, 4):
            batch = range(epoch * num_forget + start, epoch * num_forget + min(start + 4, num_forget))
            drawn = [row for draw in batch for row in streams.indices(draw)["retain"]]
            assert len(drawn) == size if len(batch) == 4 else 1 <= len(drawn) <= size
            taken += drawn
    if num_forget == 8:  # no step is incomplete: every row comes as often as any other
        assert set(Counter(taken).values()) <= {2 * size * 7 // 7}


def test_an_aligned_stream_follows_its_leader_whatever_that_is():
    sets = {name: rows(6 if "forget" in name else 5) for name in ("forget", "retain", "retain_other")}
    share = {"retain": Fraction(1, 2)}
    streams = PairedStreams(sets, 0, 4, aligned={"retain_other": "retain", "absent": "forget"}, rows_per_draw=share)
    for drawn in draws(streams, 3):
        assert drawn["retain"] == drawn["retain_other"]
    sets["retain_other"] = rows(4)
    with pytest.raises(ValueError, match="retain_other set has 4 rows for 5 retain rows"):
        PairedStreams(sets, 0, 4, aligned={"retain_other": "retain"})


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="retain set has no rows"):
        PairedStreams({"forget": rows(2), "retain": []}, 0, 2)
    with pytest.raises(TypeError, match="no length"):
        PairedStreams({"forget": Dataset.from_list(rows(2)).to_iterable_dataset()}, 0, 2)


def of_lengths(lengths, name="x"):
    return [{"prompt": "a" * int(length), "completion": name} for length in lengths]


def varied(num, seed):
    return np.random.default_rng(seed).integers(1, 300, num)


def grouped(num_forget=1000, num_retain=700, rows_per_step=8, **settings):
    sets = {"forget": of_lengths(varied(num_forget, 0)), "retain": of_lengths(varied(num_retain, 1))}
    return PairedStreams(sets, 0, rows_per_step, length_column="length", **settings)


def padding(streams, batch, epochs=2):
    """Share of padding where a batch is as wide as the longest row of both streams, by draw."""
    lengths = {name: np.array([len(row["prompt"]) for row in stream.rows]) for name, stream in streams.streams.items()}
    chosen = [[lengths[name][i] for name in lengths for i in draw[name]] for draw in draws(streams, epochs)]
    batches = [[n for d in chosen[i : i + batch] for n in d] for i in range(0, len(chosen), batch)]
    return 1 - sum(map(sum, batches)) / sum(len(widths) * max(widths) for widths in batches)


def test_batches_by_length_have_every_row_once_an_epoch_and_little_padding():
    streams = grouped()
    for epoch in range(2):
        assert sorted(streams.indices(epoch * 1000 + d)["forget"][0] for d in range(1000)) == list(range(1000))
    counts = Counter(d["retain"][0] for d in draws(streams, 7))
    assert set(counts.values()) == {10}
    sets = {name: stream.rows for name, stream in streams.streams.items()}
    assert padding(streams, 8) < 0.15 < 0.4 < padding(PairedStreams(sets, 0, 8), 8)


def test_batches_by_length_take_as_many_rows_of_each_stream_as_without():
    settings = {"rows_per_draw": {"retain": Fraction(1, 2)}, "multiple_of": 4}
    sets = {"forget": of_lengths(varied(30, 0)), "retain": rows(7) + rows(6, pictured=True)}
    plain, by_length = (PairedStreams(sets, 0, 8, length_column=column, **settings) for column in (None, "length"))
    first, second = draws(plain, 13), draws(by_length, 13)
    assert [[len(rows) for rows in d.values()] for d in first] == [[len(rows) for rows in d.values()] for d in second]
    pictured = [[d["retain"][0] >= 7 for d in drawn if d["retain"]] for drawn in (first, second)]
    assert pictured[0] == pictured[1]
    counts = Counter(row for d in second for row in d["retain"])
    assert max(counts.values()) - min(counts.values()) <= 2


def test_batches_by_length_do_not_depend_on_processes_or_on_where_a_run_was_resumed():
    alone, four = grouped(), grouped(multiple_of=8)
    assert draws(alone, 2) == draws(four, 2)
    resumed = grouped()
    assert [resumed.indices(d) for d in range(1234, 1300)] == [alone.indices(d) for d in range(1234, 1300)]
    assert draws(pickle.loads(pickle.dumps(alone)), 1) == draws(alone, 1)


def test_the_first_step_has_the_longest_row_of_every_stream():
    streams = grouped()
    for name, stream in streams.streams.items():
        first = [len(stream.rows[i]["prompt"]) for d in range(8) for i in streams.indices(d)[name]]
        assert max(first) == max(len(row["prompt"]) for row in stream.rows)


def test_a_row_is_as_long_as_the_longest_of_those_that_come_with_it():
    sets = {"forget": of_lengths([1] * 400), "preferred": of_lengths(varied(400, 0)), "retain": rows(50)}
    streams = PairedStreams(sets, 0, 4, aligned={"preferred": "forget"}, length_column="length")
    assert all(d["forget"] == d["preferred"] for d in draws(streams, 2))
    lengths = np.array([len(sets["preferred"][d["preferred"][0]]["prompt"]) for d in draws(streams, 2)]).reshape(-1, 4)
    assert np.ptp(lengths, axis=1).mean() < 30 < np.ptp(varied(400, 0).reshape(-1, 4), axis=1).mean()


def test_lengths_are_read_from_a_column_of_the_sets_that_have_it():
    tokens = [{"prompt": "a", "completion": "b", "tokens": 1 + i % 2} for i in range(400)]
    streams = PairedStreams({"forget": tokens, "retain": rows(20)}, 0, 4, length_column="tokens")
    drawn = np.array([d["forget"][0] % 2 for d in draws(streams, 1)]).reshape(-1, 4)
    assert (np.ptp(drawn, axis=1) == 0).mean() > 0.9
    with pytest.raises(ValueError, match=r"forget, retain.*'tokns'"):
        PairedStreams({"forget": tokens, "retain": rows(20)}, 0, 4, length_column="tokns")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_dealt_batches_are_of_like_length_and_modality_and_come_by_every_row(num_ranks):
    data = of_lengths(varied(50, 0)) + [{**row, "images": ["a.png"]} for row in of_lengths(varied(21, 1))]
    dealt = [dealt_batches(data, 4, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(row for mine in dealt for batch, counts in mine if counts for row in batch) == list(range(71))
    for together in zip(*dealt, strict=True):
        assert len({row >= 50 for batch, _ in together for row in batch}) == 1
    texts = [max(len(data[row]["prompt"]) for row in batch) for mine in dealt for batch, _ in mine if batch[0] < 50]
    shortest = [min(len(data[row]["prompt"]) for row in batch) for mine in dealt for batch, _ in mine if batch[0] < 50]
    assert max(texts) == max(varied(50, 0)) and np.subtract(texts, shortest).mean() < 30
