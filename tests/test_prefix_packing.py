import numpy as np
import pytest
import torch

from biasunlearn_trainer.prefix_packing import pack


def batch_of(sequences, starts):
    """Right-padded sequences of ids whose completion begins at `starts`."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, start : len(sequence)] = True
    return {"input_ids": ids, "completion_mask": mask}


def packed(sequences, starts, is_picture=None, pictures=None, one_row=False):
    batch = batch_of(sequences, starts)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    none = torch.zeros_like(batch["completion_mask"])
    return pack(
        batch, positions, none if is_picture is None else is_picture, pictures or [0] * len(sequences), one_row=one_row
    )


def test_two_answers_by_hand():
    # 1 2 | 3 4 and 1 2 | 5: the question stands once, the last tokens predict nothing.
    found = packed([[1, 2, 3, 4], [1, 2, 5]], [2, 2], one_row=True)
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert found.inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert found.keep.tolist() == [[False, True, True]]
    assert found.places.tolist() == [0, 1, 0], "3 and 5 are both predicted at 2, and 4 at 3"
    assert found.visible.tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]


def test_branches_do_not_see_each_other():
    # 1 2 | 3 9 and 1 2 | 4 9 in one row: 1 2 3 4, where 4 stands behind 3 and sees 1 and 2 alone.
    found = packed([[1, 2, 3, 9], [1, 2, 4, 9]], [2, 2])
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert found.inputs["position_ids"].tolist() == [[0, 1, 2, 2]]
    assert found.visible[0, 3].tolist() == [True, True, False, True]
    assert found.places.tolist() == [0, 1, 0, 2]


def test_trees_that_share_nothing_stand_in_one_row():
    found = packed([[1, 2, 9], [5, 6, 9]], [1, 1], one_row=True)
    assert found.inputs["input_ids"].tolist() == [[1, 2, 5, 6]]
    assert found.inputs["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert found.visible[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_pictures_are_shared_whole_or_not_at_all():
    sequences = [[1, 7, 7, 2, 9], [1, 7, 7, 3, 9], [1, 7, 7, 2, 9]]
    is_picture = batch_of(sequences, [4] * 3)["input_ids"] == 7
    found = packed(sequences, [4] * 3, is_picture, pictures=[0, 0, 1], one_row=True)
    assert found.laid_pictures == [2, 0], "sequence 2 has a picture of its own, 1 that of 0"
    assert found.inputs["input_ids"].tolist() == [[1, 7, 7, 2, 1, 7, 7, 2, 3]]
    # A picture that is the same, behind other words than before, is another part of another sentence.
    other = packed([[1, 5, 7, 9], [1, 6, 7, 9]], [3] * 2, torch.tensor([[False, False, True, False]] * 2), [0, 0], True)
    assert other.inputs["input_ids"].tolist() == [[1, 5, 7, 1, 6, 7]] and other.laid_pictures == [0, 1]


def test_identical_rows_are_one():
    found = packed([[1, 2, 3]] * 5, [1] * 5)
    assert found.inputs["input_ids"].tolist() == [[1, 2]] and found.places.tolist() == [0, 1] * 5


def test_equal_rows_that_share_nothing_are_not_made_wider():
    sequences = [[10 * i + j for j in range(300)] for i in range(1, 5)]
    assert packed(sequences, [1] * 4).keep.shape == (4, 299)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_sequence_in_random_trees(seed):
    rng = np.random.default_rng(seed)
    sequences = [[1, *rng.integers(2, 4, rng.integers(1, 30)).tolist()] for _ in range(rng.integers(1, 40))]
    starts = [int(rng.integers(1, len(sequence))) for sequence in sequences]
    found = packed(sequences, starts)
    ids, positions = found.inputs["input_ids"], found.inputs["position_ids"]
    predictors = found.keep.nonzero()[found.places]
    told = [
        (sequence[:t]) for sequence, start in zip(sequences, starts, strict=True) for t in range(start, len(sequence))
    ]
    for before, (row, place) in zip(told, predictors.tolist(), strict=True):
        seen = found.visible[row, place]
        assert ids[row, seen].tolist() == before
        assert positions[row, seen].tolist() == list(range(len(before)))
    distinct = {tuple(sequence[: t + 1]) for sequence in sequences for t in range(len(sequence) - 1)}
    assert len(distinct) <= ids.numel() <= sum(map(len, sequences)) + ids.shape[1]
