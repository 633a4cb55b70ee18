import numpy as np
import pytest
import torch

from biasunlearn_trainer.prefix_trees import prefix_tree


def batch_of(sequences, starts):
    """Right-padded sequences of ids whose completion begins at `starts`."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, start : len(sequence)] = True
    return {"input_ids": ids, "completion_mask": mask}


def tree_of(sequences, starts, is_picture=None, pictures=None, num_blocks=1):
    batch = batch_of(sequences, starts)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    none = torch.zeros_like(batch["completion_mask"])
    return prefix_tree(
        batch,
        positions,
        none if is_picture is None else is_picture,
        pictures or [0] * len(sequences),
        num_blocks=num_blocks,
    )


def seen(tree, token):
    """Numbers of the tokens that a token sees, in the order of their block."""
    block, place = divmod(token, tree.visible.shape[1])
    return tree.keys[block, tree.visible[block, place]].tolist()


def test_two_answers_by_hand():
    # 1 2 | 3 4 and 1 2 | 5: the question stands once, the last tokens predict nothing.
    tree = tree_of([[1, 2, 3, 4], [1, 2, 5]], [2, 2])
    assert tree.inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert tree.inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert tree.keep.tolist() == [[False, True, True]]
    assert tree.places.tolist() == [0, 1, 0], "3 and 5 are both predicted at 2, and 4 at 3"
    assert tree.keys.tolist() == [[0, 1, 2]]
    assert tree.visible.tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]


def test_branches_do_not_see_each_other():
    # 1 2 | 3 9 and 1 2 | 4 9: 1 2 3 4, where 4 stands behind 3 and sees 1 and 2 alone.
    tree = tree_of([[1, 2, 3, 9], [1, 2, 4, 9]], [2, 2])
    assert tree.inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert tree.inputs["position_ids"].tolist() == [[0, 1, 2, 2]]
    assert tree.visible[0, 3].tolist() == [True, True, False, True]
    assert tree.places.tolist() == [0, 1, 0, 2]


def test_trees_that_share_nothing_stand_in_one_row():
    tree = tree_of([[1, 2, 9], [5, 6, 9]], [1, 1])
    assert tree.inputs["input_ids"].tolist() == [[1, 2, 5, 6]]
    assert tree.inputs["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert tree.visible[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_block_asks_itself_and_the_ancestors_of_its_first_token():
    # 1 2 3 | 4 and 1 2 3 | 5 in the order 1 2 3 4 5, two blocks of three: 5 is behind 4, which it must not see.
    tree = tree_of([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9]], [3, 3], num_blocks=2)
    assert tree.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert tree.keys.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert tree.visible[0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert tree.visible[1].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [0] * 6], "the last is padding"


def test_pictures_are_shared_whole_or_not_at_all():
    sequences = [[1, 7, 7, 2, 9], [1, 7, 7, 3, 9], [1, 7, 7, 2, 9]]
    is_picture = batch_of(sequences, [4] * 3)["input_ids"] == 7
    tree = tree_of(sequences, [4] * 3, is_picture, pictures=[0, 0, 1])
    assert tree.laid_pictures == [2, 0], "sequence 2 has a picture of its own, 1 that of 0"
    assert tree.inputs["input_ids"].tolist() == [[1, 7, 7, 2, 1, 7, 7, 2, 3]]
    # A picture that is the same, behind other words than before, is another part of another sentence.
    other = tree_of([[1, 5, 7, 9], [1, 6, 7, 9]], [3] * 2, torch.tensor([[False, False, True, False]] * 2), [0, 0])
    assert other.inputs["input_ids"].tolist() == [[1, 5, 7, 1, 6, 7]] and other.laid_pictures == [0, 1]


def test_identical_rows_are_one():
    tree = tree_of([[1, 2, 3]] * 5, [1] * 5)
    assert tree.inputs["input_ids"].tolist() == [[1, 2]] and tree.places.tolist() == [0, 1] * 5


def test_the_cheapest_blocks():
    answers = [[*range(100), 200 + i, 9] for i in range(400)]
    short, long = (
        tree_of(sequences, [1] * len(sequences), num_blocks=None)
        for sequences in ([[i, i, 9] for i in range(200)], answers)
    )
    assert short.visible.shape == (25, 16, 16), "sentences of two words look at few tokens"
    assert long.visible.shape[1] > 16, "a hundred tokens that all have in common are not laid for every few answers"
    assert tree_of(answers, [100] * 400, num_blocks=7).visible.shape[:2] == (7, 72)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_sequence_in_random_trees(seed):
    rng = np.random.default_rng(seed)
    sequences = [[1, *rng.integers(2, 4, rng.integers(1, 30)).tolist()] for _ in range(rng.integers(1, 40))]
    starts = [int(rng.integers(1, len(sequence))) for sequence in sequences]
    tree = tree_of(sequences, starts, num_blocks=int(rng.integers(1, 20)))
    ids, positions = tree.inputs["input_ids"][0], tree.inputs["position_ids"][0]
    predictors = tree.keep[0].nonzero()[tree.places, 0].tolist()
    told = [
        (sequence[:t]) for sequence, start in zip(sequences, starts, strict=True) for t in range(start, len(sequence))
    ]
    for before, token in zip(told, predictors, strict=True):
        assert ids[seen(tree, token)].tolist() == before
        assert positions[seen(tree, token)].tolist() == list(range(len(before)))
    distinct = {tuple(sequence[: t + 1]) for sequence in sequences for t in range(len(sequence) - 1)}
    assert len(ids) == len(distinct), "no token twice, and no padding"
