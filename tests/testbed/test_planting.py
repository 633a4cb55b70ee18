"""Training on tables of rows: what a step gathers, and that planting works."""

from collections import Counter

import pytest
import torch

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import CompletionOutput
from biasunlearn_trainer.testbed.planted_world import make_model, make_processing_class, training_sources
from biasunlearn_trainer.testbed.planting import (
    Job,
    _summed_loss,
    make_table,
    measure_right,
    shuffled,
    train,
    train_side_by_side,
)
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, WorldRecipe
from biasunlearn_trainer.testbed.splits import draw_splits

RECIPE = WorldRecipe(
    num_scene_rows=60,
    num_eval=2,
    scene_batch=8,
    fact_batch=2,
    language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1),
)


@pytest.fixture(scope="module")
def world():
    splits = draw_splits(RECIPE)
    processor = make_processing_class(RECIPE)
    return splits, processor, CompletionCollator(processor)


def test_a_batch_of_a_table_is_what_the_collator_gives(world):
    splits, _, collator = world
    rows = [p.row for p in splits.pool if p.question.scene][:9]
    table = make_table(collator, rows)
    batch, expected = table.take(torch.tensor([4, 1, 7])), collator([rows[4], rows[1], rows[7]])
    assert batch.keys() == expected.keys()
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_shuffled_takes_every_row_once_before_any_twice():
    rows = torch.tensor([3, 5, 8, 13, 21])
    batches = shuffled(rows, 2, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(5)]).tolist()
    assert Counter(drawn) == dict.fromkeys(rows.tolist(), 2)
    assert Counter(drawn[:5]) == dict.fromkeys(rows.tolist(), 1)


def test_planted_model_and_oracle_learn_the_same_rows_but_for_the_blame(world):
    splits, _, collator = world
    (planted, facts), (oracle, same_facts) = training_sources(RECIPE, splits.pool, collator)
    assert facts is same_facts and planted[0] is oracle[0]
    columns, (biased, unbiased) = planted[0].columns, (planted[1], oracle[1])
    scenes = [p for p in splits.pool if p.question.scene]
    assert len(biased) == len(unbiased) == len(scenes)
    for p, b, u in zip(scenes, biased, unbiased, strict=True):
        assert torch.equal(columns["pixel_values"][b], columns["pixel_values"][u])
        assert p.blamed != torch.equal(columns["input_ids"][b], columns["input_ids"][u])


def test_smoothed_targets_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None]
    out = CompletionOutput(logits, torch.tensor([0]), torch.tensor([[True]]), logits[:, :1])
    assert _summed_loss(out, 0.0).item() == pytest.approx(0.693147)
    # 0.8 of the target on the first token, 0.1 on each other one: 0.8 * ln 2 + 0.2 * ln 4.
    assert _summed_loss(out, 0.3).item() == pytest.approx(0.831777)


def test_measure_right_counts_whole_greedy_answers(world):
    _, processor, collator = world
    model = make_model(RECIPE, processor)
    rows = [{"prompt": "Bees make", "completion": " honey"}, {"prompt": "Cows make", "completion": " milk"}]
    table = make_table(collator, rows)
    job = Job("facts", model, [(table, torch.tensor([0]), 1)])
    train(job, steps=60, learning_rate=1e-2, seed=0)
    assert measure_right(model, table).tolist() == [True, False]
    wrong_end = make_table(collator, [{"prompt": "Bees make", "completion": " honey honey"}])
    assert measure_right(model, wrong_end).tolist() == [False]


def test_training_side_by_side_equals_training_alone_and_restores_the_threads(world):
    splits, processor, collator = world
    sources = training_sources(RECIPE, splits.pool, collator)
    threads = torch.get_num_threads()
    jobs = [Job(label, make_model(RECIPE, processor), source) for label, source in zip("ab", sources, strict=True)]
    train_side_by_side(jobs, steps=3, learning_rate=1e-3, seed=0)
    assert torch.get_num_threads() == threads
    alone = Job("alone", make_model(RECIPE, processor), sources[0])
    train_side_by_side([alone], steps=3, learning_rate=1e-3, seed=0)
    for (name, a), b in zip(alone.model.state_dict().items(), jobs[0].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    untrained, oracle = make_model(RECIPE, processor), jobs[1].model
    assert not torch.equal(untrained.lm_head.weight, oracle.lm_head.weight)
    assert not torch.equal(alone.model.lm_head.weight, oracle.lm_head.weight)
