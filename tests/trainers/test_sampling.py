"""`train_sampling_strategy`: batches by length in a whole run, and what is not offered."""

import pytest
import torch

from biasunlearn_trainer import NPOConfig

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


def logged(trainer):
    trainer.train()
    return [{k: v for k, v in e.items() if k == "loss" or "/" in k} for e in trainer.state.log_history if "loss" in e]


def varied_rows(num, name):
    return [{"prompt": f"{name} {i} " + "so " * (i * 7 % 11), "completion": " it" * (1 + i % 3)} for i in range(num)]


def sets(num_forget=40, num_retain=24):
    return {"forget_dataset": varied_rows(num_forget, "f"), "retain_dataset": varied_rows(num_retain, "r")}


def widths(trainer, batch_size):
    """Width of each of an epoch's micro-batches, by stream."""
    draws = trainer.train_dataset
    batches = [
        trainer.data_collator([draws[d] for d in range(start, min(start + batch_size, len(draws)))])
        for start in range(0, len(draws), batch_size)
    ]
    return {name: [batch[name]["input_ids"].shape[1] for batch in batches] for name in batches[0]}


def test_batches_are_narrower_and_the_widest_comes_first(make_trainer):
    settings = {"datasets": sets(120, 120), "max_steps": -1, "per_device_train_batch_size": 4}
    shuffled, grouped = make_trainer("ga_diff", **settings), make_trainer("ga_diff", **settings, **BY_LENGTH)
    before, after = widths(shuffled, 4), widths(grouped, 4)
    for name in before:
        assert sum(after[name]) < 0.9 * sum(before[name])
        assert after[name][0] == max(before[name] + after[name])


@pytest.mark.parametrize("method", ["npo", "biasunlearn"])
def test_the_cut_of_a_batch_changes_no_loss(method, make_trainer):
    """Ten rows by four, completions of different lengths, an incomplete last batch."""
    runs = [
        logged(
            make_trainer(
                method,
                num_forget=10,
                max_steps=6,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                **BY_LENGTH,
            )
        )
        for size, steps in ((4, 1), (2, 2), (1, 4))
    ]
    for other in runs[1:]:
        assert [a == pytest.approx(b, abs=2e-5, rel=2e-5) for a, b in zip(runs[0], other, strict=True)] == [True] * 6


def test_a_resumed_run_ends_bit_identical(make_trainer, tmp_path):
    def run(folder, resume=None):
        settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / folder)}
        trainer = make_trainer("npo", datasets=sets(8, 12), **settings, **BY_LENGTH)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole, resumed = run("whole"), run("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_column_of_lengths_decides(make_trainer):
    """Short texts that a column calls long stand together."""
    rows = [{**row, "cost": (i % 2) * 100} for i, row in enumerate(varied_rows(40, "f"))]
    datasets = {"forget_dataset": rows, "retain_dataset": varied_rows(8, "r")}
    trainer = make_trainer("npo", datasets=datasets, length_column_name="cost", **BY_LENGTH)
    drawn = [trainer.train_dataset.indices(d)["forget"][0] % 2 for d in range(40)]
    assert sum(a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True)) >= 16


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance", "grouped_by_length"])
def test_other_strategies_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=r"`train_sampling_strategy` must be one of random, group_by_length"):
        NPOConfig(str(tmp_path), train_sampling_strategy=strategy)


def test_a_column_that_nothing_reads_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="`length_column_name` has no effect"):
        NPOConfig(str(tmp_path), length_column_name="tokens")
    with pytest.raises(ValueError, match=r"forget, retain.*'tokens'"):
        make_trainer("npo", length_column_name="tokens", **BY_LENGTH)
