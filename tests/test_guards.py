"""The collapse guard's bounds by hand, what a resumed run knows, memory errors and what is said about them."""

import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.guards import CollapseGuard, memory_advice, ran_out_of_memory

SETTINGS = {
    "eval_batch_size": 64,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "activation_checkpointing": False,
    "max_length": None,
    "use_peft": False,
    "load_in_4bit": False,
    "dtype": "float32",
    "reference": "auto",
    "processes": 1,
    "backend": "whole",
}


def judge(guard, *records, output_dir="nowhere", **args):
    state, control = TrainerState(), TrainerControl()
    control.should_save = True
    for step, record in enumerate(records):
        state.global_step = step * 10
        state.log_history.append({**record, "step": step * 10})
        guard.on_log(TrainingArguments(str(output_dir), use_cpu=True, **args), state, control, logs=record)
    return state, control


def test_an_exploding_gradient_is_one_far_above_the_median_so_far():
    norms = [{"grad_norm": value} for value in (1.0, 9.0, 2.0, 3.0, 2.0)]  # median 2
    for last, speaks in ((200.0, False), (200.1, True)):
        guard = CollapseGuard(action="stop")
        _, control = judge(guard, *norms, {"grad_norm": last})
        assert control.should_training_stop is speaks and bool(guard.messages) is speaks
    for words in ("step 50", "100 times its median of 2", "guard_max_grad_growth", "learning_rate"):
        assert words in guard.messages[0]
    guard = CollapseGuard(max_grad_growth=None)
    judge(guard, *norms, {"grad_norm": 1e9})
    assert guard.messages == []


def test_four_norms_are_too_few_to_tell():
    guard = CollapseGuard()
    judge(guard, *[{"grad_norm": 1.0}] * 4, {"grad_norm": 1e9})
    assert guard.messages == []


def test_a_perplexity_that_more_than_doubles_is_language_lost():
    first, name = {"probe/perplexity@text/word_perplexity": 30.0}, "probe/perplexity@text/word_perplexity"
    guard = CollapseGuard()
    judge(guard, first, {name: 60.0})
    assert guard.messages == []
    judge(guard, first, {name: 60.1})
    assert "rose to 60.1 from 30" in guard.messages[0] and "guard_max_perplexity 2" in guard.messages[0]
    guard = CollapseGuard()
    judge(guard, first, {name: math.inf})
    assert "rose to inf" in guard.messages[0]


def test_float16_leaves_overflowing_gradients_to_its_scaler():
    assert judge(CollapseGuard(), {"grad_norm": math.inf})[1].should_training_stop
    guard = CollapseGuard()
    state, control = TrainerState(), TrainerControl()
    args = TrainingArguments("nowhere", use_cpu=True)
    args.fp16 = True  # no CPU trains in float16
    guard.on_log(args, state, control, logs={"grad_norm": math.inf})
    assert not control.should_training_stop


def test_a_stop_writes_no_checkpoint_and_names_the_one_before(tmp_path):
    from biasunlearn_trainer.checkpoints import UNFINISHED, complete

    (tmp_path / UNFINISHED / "checkpoint-3").mkdir(parents=True)
    complete(tmp_path / UNFINISHED / "checkpoint-3", tmp_path / "checkpoint-3", {})
    guard = CollapseGuard(action="stop")
    _, control = judge(guard, {"loss": 51.0}, output_dir=tmp_path)
    assert not control.should_save
    assert f"The checkpoint before it is that of step 3, {tmp_path / 'checkpoint-3'}" in guard.messages[0]
    warned = judge(CollapseGuard(action="warn"), {"loss": 51.0}, output_dir=tmp_path)[1]
    assert warned.should_save


def test_a_resumed_run_judges_as_if_it_had_not_been_interrupted(caplog):
    records = [{"probe/planted/facts": 1.0}, *[{"grad_norm": 1.0}] * 5, {"probe/planted/facts": 0.5}]
    whole = CollapseGuard()
    state, _ = judge(whole, *records)
    caplog.clear()
    resumed = CollapseGuard()
    resumed.on_train_begin(TrainingArguments("nowhere", use_cpu=True), state, TrainerControl())
    assert resumed.messages == whole.messages and len(whole.messages) == 1
    assert not caplog.text  # it was said when it happened
    for guard in (whole, resumed):
        control = TrainerControl()
        for logs in ({"probe/planted/facts": 0.4}, {"grad_norm": 101.0}):
            guard.on_log(TrainingArguments("nowhere", use_cpu=True), state, control, logs=logs)
        assert len(guard.messages) == 2 and "101 times its median" in guard.messages[1]


def test_memory_errors_are_told_from_others():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert ran_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        bytearray(2**60)
    assert ran_out_of_memory(caught.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not ran_out_of_memory(caught.value)


def test_advice_names_values_and_leaves_out_what_is_used_up():
    advice = memory_advice("training", SETTINGS)
    for words in (
        "per_device_train_batch_size: 8, gradient_accumulation_steps: 2",
        "activation_checkpointing: False",
        "use_peft: False",
        "load_in_4bit: False",
        "dtype: float32",
        "reference: auto",
        "eval_batch_size: 64",
        "max_length: None",
        "1 process(es), whole",
    ):
        assert words in advice
    used = SETTINGS | {
        "per_device_train_batch_size": 1,
        "activation_checkpointing": True,
        "use_peft": True,
        "load_in_4bit": True,
        "dtype": "bfloat16",
        "reference": "precomputed",
        "eval_batch_size": 1,
    }
    assert memory_advice("training", used).count("\n") == 1  # max_length and more processes
    assert "per_device" not in memory_advice("evaluation", SETTINGS) and "eval_batch_size" in memory_advice(
        "evaluation", SETTINGS
    )
